"""The evaluation harness: samples, tasks, scores, the runner and its results, reports, lm-evaluation-harness."""
