"""Studies of routing quality: runs, operating points, tables and pictures from folders of runs."""
