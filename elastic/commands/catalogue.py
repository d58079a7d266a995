"""The commands of `elastic`, each with the line that `elastic --help` and its own `--help` show."""

TRAINING = {
    "fit": "train routers on packed data",
    "validate": "score routers on the validation split",
    "test": "score routers on the test split, with a table and a results file",
    "predict": "write routes and answers per sample",
}
COMMANDS = {
    "data_prep": "make training data: records from generators or published data sets, then packed rows",
    "calibrate": "measure what each KV head is needed for, and write an order of the heads",
    "generate": "answer prompts with a routed model and show its routes",
    "serve": "serve a routed model over an OpenAI-compatible HTTP endpoint",
    "push": "publish the routers of a checkpoint, with a model card, on the Hugging Face Hub or in a folder",
    "pull": "fetch routers that somebody published, checked, into a folder",
    "eval": "compare dense, sparse, static, random and trained routing on packed rows, RULER and LongBench",
    "demo": "what routing does, on this machine: ask, calibrate, fit routers, compare with dense, answer",
    "bench": "time the kernels on this GPU beside their competitors; show recorded timings",
    "doctor": "what this machine can run, with a self-check",
}
# What a command that was stopped is resumed with; the others begin again.
RESUMED = {
    "fit": "to resume, repeat it with --ckpt_path last (from the last save in the run's folder)",
    "eval": "to resume, repeat it; finished results stay",
    "calibrate": "to resume, repeat it; measured batches stay",
    "demo": "to resume, repeat it; measured batches stay",
    "data_prep pack_mixture": "to resume, repeat it; finished shards stay",
}
