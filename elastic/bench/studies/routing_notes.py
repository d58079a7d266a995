"""What the tables of `elastic bench routing` mean, in words: it depends on what equal quality bound when the records
were made.
"""

from collections.abc import Sequence

from elastic.bench.records import Measurement
from elastic.bench.studies.bounds import CHOSEN, KEPT, RISE
from elastic.training.paired import RESAMPLES

BOUNDS, BY_SOURCE = "bounds", "every source"  # a field of records of MSR at equal quality; earlier ones lack it
ROWS = "rows"  # a field of records of headlines: the set of rows, where they are not of the training's kind
_HOW = """Answers teacher-forced on held-out samples (other seeds, wording and texts than in training); exact: all
answer tokens right, which is what greedy decoding would give."""
_INTERVALS = """± half a 95 % interval: over seeds by Student's t in the first two tables,
over samples in the third, where seeds are averaged."""
NOTES = f"""{_HOW} Retrieval: mean of exact answers over
the sources of sensitive tasks, each of the same weight; text loss: mean of the loss rows, worst text loss: that of
the source which loses most; in-context: exact answers of many_shot. {_INTERVALS}

Validation rows: every operating point (second table), and MSR at equal quality: the largest mean MSR that keeps
{KEPT:.0%} of dense retrieval, {KEPT:.0%} of dense's exact answers of many_shot, and loses at most {RISE:.0%} on each
text source, by straight lines between a run's points; ≥ where a seed's sparsest point is of equal quality still;
`elastic - static` pairs seeds. They choose `sparsity_bias`: the sparsest within these bounds that keeps {CHOSEN:.0%} of
dense retrieval, or the best where none does. Test rows, which had no part in choosing: the chosen points, other columns
of the first table and in the third. Empty cells: not measured."""
EARLIER_NOTES = f"""{_HOW} Retrieval: mean of the exact and accuracy rows but
many_shot; text loss: mean of the loss rows. {_INTERVALS}

Validation rows: every operating point (second table), and MSR at equal quality: the largest mean MSR that keeps
{KEPT:.0%} of dense retrieval and loses at most {RISE:.0%} on text, by straight lines between a run's points; ≥ where
a seed's sparsest point is of equal quality still; `elastic - static` pairs seeds. They choose `sparsity_bias`: the
sparsest that keeps {CHOSEN:.0%} of dense retrieval at that loss, or the best where none does. Test rows, which had no
part in choosing: the chosen points, other columns of the first table and in the third. Empty cells: not measured."""
PAIRED_NOTES = f"""All operating points on the same test samples: the MSR at which a share of dense retrieval is kept
(all bounds: and those of every other source), straight between points once rises are averaged out; ≥ where some
seed's sparsest point keeps it still (≤ where a rival's does, ≈ where both do). The rival is each seed's strongest
family of static heads. [95 % interval of a paired bootstrap, {RESAMPLES:,} draws of samples within sources, of the mean
over seeds]; ± over seeds by Student's t."""


FOREIGN_NOTES = """The foreign set: kinds of questions whose wording, names and layouts no training text shares
(docs/evaluation.md). Operating points were chosen on validation rows of the training's kind alone; no row of this set
had a part. Lengths and system prompts of a text source are bound together."""


def notes(found: Sequence[Measurement]) -> str:
    """The words for these records."""
    if any(record.get(ROWS) for record in found):
        return f"{FOREIGN_NOTES}\n\n{NOTES}"
    return NOTES if any(record.get(BOUNDS) == BY_SOURCE for record in found) else EARLIER_NOTES
