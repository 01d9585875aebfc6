"""Training: a recipe of timm's train-script options, a loop on Accelerate, a run folder."""
