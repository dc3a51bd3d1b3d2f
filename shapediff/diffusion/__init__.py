"""Gaussian diffusion on tensors of any shape (batch first): schedules, the algebra, losses, guidance, samplers. Torch alone."""
