"""Sizes of a transformer encoder, as a part of `config.json` holds them."""

from dataclasses import dataclass, fields

from vlsm.networks.transformer import ACTIVATIONS

MOST = dict(hidden_size=1 << 16, num_hidden_layers=1000, image_size=1 << 13, patch_size=1 << 10)
VISION_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)


def select_fields(config_class, values):
    """Return those of the `values` (a dictionary) that are fields of a dataclass and not None."""
    names = {f.name for f in fields(config_class)}
    return {name: value for name, value in values.items() if name in names and value is not None}


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a CLIP encoder; the defaults are those that `config.json` leaves out (text encoder)."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32

    @classmethod
    def from_dict(cls, values, name):
        """Read the part `name` of a `config.json`. Raises ValueError for sizes that cannot work."""
        config = cls(**select_fields(cls, values))
        for f in fields(cls):
            value, most = getattr(config, f.name), MOST.get(f.name, 1 << 20)
            number = type(value) in (int, float) and (value > 0 or f.name == "eos_token_id")
            if f.type is not str and not (number and value <= most):
                raise ValueError(f"{name}.{f.name} is {value!r}; give a number of at most {most}.")
        heads, width = config.num_attention_heads, config.hidden_size
        if config.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"{name}.hidden_act is '{config.hidden_act}'; known are {known}.")
        if width % heads:
            raise ValueError(f"{name}: hidden_size {width} is no multiple of {heads} heads.")
        return config
