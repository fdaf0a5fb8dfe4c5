"""Models and images without structure, the same each time."""

import torch


def roughened(model, spread=0.2):
    """Every parameter moved away from its initial value, so that no zero hides a wrong connection."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
