"""Fine-tuning as a pipeline: labelled examples, prompts, scores, the training loop, the report."""
