"""A model's configuration: from a folder or an alias's record, resolved by the library, kept as plain JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from featurecache.backbones.aliases import Alias
from featurecache.backbones.families import FAMILIES, Family
from featurecache.errors import UnknownBackbone, WeightsDoNotFit, WeightsNotFound

# Of a configuration, what decides no feature: names, paths, versions, labels, how the library is to be used; and one
# that transformers 5.17 does not list: whether a SigLIP has its head shows in the weights.
_BOOKKEEPING = {
    "_name_or_path", "name_or_path", "architectures", "auto_map", "transformers_version", "model_type",
    "id2label", "label2id", "num_labels", "problem_type", "dtype", "torch_dtype", "_attn_implementation",
    "attn_implementation", "return_dict", "output_hidden_states", "output_attentions", "is_encoder_decoder",
    "chunk_size_feed_forward", "stage_names", "out_features", "out_indices", "_out_features", "_out_indices",
    "vision_use_head",
}  # fmt: skip


def configuration(folder: Path | None, title: str, alias: Alias | None) -> tuple[Family, Any]:
    """The family and the resolved configuration of the vision model."""
    import transformers

    if folder is None:
        assert alias is not None
        family = FAMILIES[alias.model_type]
        return family, _config_class(family)(**alias.config)
    family, kind = _family(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library's strict configurations have errors of their own
        raise WeightsDoNotFit(f"{folder / 'config.json'} is not a configuration of {kind}: {error}") from error
    config = getattr(config, "vision_config", config)
    if getattr(config, "quantization_config", None):
        raise WeightsDoNotFit(f"{title} is quantised; expected plain weights (float32, float16 or bfloat16)")
    if alias is not None:
        _same_shape(title, alias, config)
    return family, config


def _family(folder: Path) -> tuple[Family, str]:
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsNotFound(
            f"{folder} has no config.json; expected a folder written by save_pretrained. If it holds weights of a "
            f"known architecture: --backbone NAME --weights {folder}"
        )
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise WeightsDoNotFit(f"{path} is not a configuration in JSON: {error}") from error
    if kind not in FAMILIES:
        raise UnknownBackbone(f'{folder} holds a model of type "{kind}"; expected one of {", ".join(FAMILIES)}')
    return FAMILIES[kind], kind


def _config_class(family: Family) -> Any:
    import transformers

    return getattr(transformers, family.model).config_class


def _same_shape(title: str, alias: Alias, config: Any) -> None:
    """--weights FOLDER with an alias: the folder's own configuration counts, but it must be that architecture."""
    kind = _config_class(FAMILIES[alias.model_type])
    keys = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
    differ = [f"{key} {getattr(config, key, None)}, expected {alias.config[key]}" for key in keys]
    differ = [text for key, text in zip(keys, differ, strict=True) if getattr(config, key, None) != alias.config[key]]
    if not isinstance(config, kind) or differ:
        what = "; ".join(differ) if isinstance(config, kind) else f"a {type(config).__name__}, expected {kind.__name__}"
        raise WeightsDoNotFit(f"{title} is another architecture: {what}. As it is: --backbone {title}")


def plain(config: Any) -> dict[str, Any]:
    """The resolved configuration as canonical JSON holds it: the keys that its class knows, without bookkeeping."""
    known = type(config)().to_dict()
    data = {key: value for key, value in config.to_dict().items() if key in known and key not in _BOOKKEEPING}
    canonical: dict[str, Any] = json.loads(json.dumps(data))
    return canonical


def pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
