"""The layers that torch.nn lacks, as `nn.Module`s: they hold parameters, the rules compute."""

__all__: list[str] = []
