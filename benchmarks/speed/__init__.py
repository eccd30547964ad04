"""What a mixture costs, beside the frozen model, plain LoRA and three other ways to compute the same mixture."""
