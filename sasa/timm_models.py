"""Our networks for timm: `import sasa.timm_models`, then timm.create_model("sasa_resnet26", num_classes=10).

Options are those of `model.ResNet`. timm is not a requirement of this project; only this file imports it.
"""

try:
    from timm.models import register_model
except ImportError as error:
    raise ImportError("sasa.timm_models needs timm: pip install timm") from error

import model


def _build(name: str, pretrained: bool, options: dict) -> model.ResNet:
    """The network; timm's own options, which say where pretrained weights would come from, have no effect.

    Raises:
        ValueError: pretrained=True, for there are no such weights.
    """
    if pretrained:
        raise ValueError(f"pretrained=True: there are no pretrained weights of {name}")
    for timms in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # where weights would come from
        options.pop(timms, None)
    return model.build(name, **options)


@register_model
def sasa_resnet26(pretrained: bool = False, **options) -> model.ResNet:
    """`model.ResNet26`."""
    return _build("ResNet26", pretrained, options)


@register_model
def sasa_resnet38(pretrained: bool = False, **options) -> model.ResNet:
    """`model.ResNet38`."""
    return _build("ResNet38", pretrained, options)


@register_model
def sasa_resnet50(pretrained: bool = False, **options) -> model.ResNet:
    """`model.ResNet50`."""
    return _build("ResNet50", pretrained, options)
