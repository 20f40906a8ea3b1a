"""Published benchmarks of ECG-language models: `elm benchmark MODEL --suite NAME`. Each suite is a file of its own here; docs/benchmarks.md
says how to add one."""
