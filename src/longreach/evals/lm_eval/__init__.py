"""lm-evaluation-harness on an extended model. Needs lm_eval."""
