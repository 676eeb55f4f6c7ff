"""Pre-trained towers: the features of transformers itself, strict loading, frozen and LoRA weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fixtures import small_model
from fixtures.small_model import MODEL, observation
from fixtures.towers import LANGUAGE, SIZE, VISION, save_tower
from tutti.config.run_config import load_config, to_yaml
from tutti.data.cache.entries import entries, evict
from tutti.data.tokenize import Tokenizer
from tutti.distributed.world import World
from tutti.models.config import ModelConfig, exported, load_towers, pretrained_parts
from tutti.models.describe import blank_observation, describe
from tutti.models.layers import blocks_of
from tutti.models.pretrained.convolutions import EfficientNetLite0, fix_batch_norms
from tutti.models.pretrained.hub import OLDEST, hub_folder, transformers
from tutti.models.vla import VLA
from tutti.nested_dicts import merge
from tutti.training.optim.averages import Ema
from tutti.training.optim.learning_rates import RatesConfig
from tutti.training.parallel.ddp import require_equal
from tutti.types import UserError

SPEC = replace(small_model.SPEC, image_size=SIZE)
SEEN = observation(SPEC, b=3)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder for each tower, and the networks of transformers."""
    folder = tmp_path_factory.mktemp("towers")
    return folder, {name: save_tower(folder / name, name) for name in (*VISION, *LANGUAGE)}


def config_of(socket: str, path: Path, **keys: Any) -> ModelConfig:
    more = {} if socket == "vision" else {"num_tokens": 0}
    return ModelConfig.model_validate(
        merge(MODEL, {socket: {"kind": "pretrained", "path": path, **more, **keys}})
    )


def loaded(config: ModelConfig, given: tuple[str, ...] = ()) -> VLA:
    torch.manual_seed(3)
    model = config.build(SPEC)
    load_towers(model, given)
    return model.eval()


def hidden(found: Any, layer: int | list[int]) -> torch.Tensor:
    """Those of the whole network, by transformers' own numbers."""
    several = [
        found.last_hidden_state if one == -1 else found.hidden_states[one]
        for one in (layer if isinstance(layer, list) else [layer])
    ]
    return torch.cat(several, dim=-1)


@pytest.mark.parametrize("layer", [-1, -2, [1, 3], [2, -1]])
def test_pictures_give_the_tokens_of_transformers_own(home: tuple[Path, dict[str, Any]], layer: Any) -> None:
    folder, networks = home
    images = small_model.observation(SPEC, b=1).images.float().flatten(0, 1) / 127.5 - 1
    for name in VISION:
        if isinstance(layer, list) and name in ("convnext", "resnet"):
            with pytest.raises(UserError, match=r"maps of different sizes.\n  expected: one layer"):
                loaded(config_of("vision", folder / name, layer=layer))
            continue
        model = loaded(config_of("vision", folder / name, layer=layer))
        (part,) = pretrained_parts(model).values()
        with torch.no_grad():
            found = networks[name](images * part.scale + part.shift, output_hidden_states=True)
            expected = hidden(found, layer)
            got = model.vision(images[None], torch.ones(1, 2, dtype=torch.bool))
        own = part.tower.values
        front = part.tower.facts.front + (own.get("num_register_tokens", 0) if part.tower.facts.front else 0)
        expected = expected.flatten(2).transpose(1, 2) if expected.ndim == 4 else expected[:, front:]
        expected = expected if part.project is None else part.project(expected)
        assert got.values.shape == (1, 2 * part.tokens_per_view, part.width), name
        torch.testing.assert_close(got.values[0], expected.flatten(0, 1), atol=3e-6, rtol=0)


@pytest.mark.parametrize("layer", [-1, -2, [1, 2]])
def test_texts_give_the_states_of_transformers_own(home: tuple[Path, dict[str, Any]], layer: Any) -> None:
    folder, networks = home
    for name in LANGUAGE:
        model = loaded(config_of("language", folder / name, layer=layer))
        with torch.no_grad():
            found = networks[name](
                input_ids=SEEN.text, attention_mask=SEEN.text_mask.long(), output_hidden_states=True
            )
            got = model.language(SEEN.text, SEEN.text_mask)
        project = model.language.project  # pyright: ignore
        expected = hidden(found, layer) if project is None else project(hidden(found, layer))
        assert got.mask.equal(SEEN.text_mask), name
        torch.testing.assert_close(got.values[got.mask], expected[got.mask], atol=1e-6, rtol=0)
        empty = torch.zeros_like(SEEN.text_mask)
        assert bool(model.language(SEEN.text, empty).values.isfinite().all()), name


def test_what_no_token_depends_on_is_not_there(home: tuple[Path, dict[str, Any]]) -> None:
    """Every parameter that is left gets a gradient."""
    folder, _ = home
    for socket, names in (("vision", VISION), ("language", LANGUAGE)):
        for name in names:
            part = getattr(loaded(config_of(socket, folder / name, layer=2)), socket)
            given = (torch.rand(2, 2, 3, SIZE, SIZE), torch.ones(2, 2, dtype=torch.bool))
            tokens = part(*given) if socket == "vision" else part.encode(SEEN.text, SEEN.text_mask)
            (tokens.values if socket == "vision" else tokens).square().sum().backward()
            assert [n for n, p in part.named_parameters() if p.grad is None] == [], name


def test_neighbours_fold_into_width_and_views_have_a_vector(home: tuple[Path, dict[str, Any]]) -> None:
    path = home[0] / "dinov2"
    plain, folded = (loaded(config_of("vision", path, shuffle=s)).vision for s in (1, 2))
    assert (plain.tokens_per_view, plain.width) == (16, 16) and (folded.tokens_per_view, folded.width) == (
        4,
        64,
    )
    images, mask = torch.rand(1, 2, 3, SIZE, SIZE), torch.tensor([[True, False]])
    one, four = (part(images, mask) for part in (plain, folded))
    assert four.mask.tolist() == [[True] * 4 + [False] * 4]
    cells = one.values[0, :16].view(2, 2, 2, 2, 16)  # row, its half, column, its half
    assert set(four.values[0, 1].tolist()) == set(cells[0, :, 1].flatten().tolist())
    with pytest.raises(UserError, match="tower gives 4 x 4"):
        config_of("vision", path, shuffle=3).build(SPEC)
    other = replace(SPEC, image_size=24)
    with pytest.raises(UserError, match=r"data\.image_size=16, or model\.vision\.interpolate=true"):
        config_of("vision", path).build(other)
    assert config_of("vision", path, interpolate=True).build(other).vision.tokens_per_view == 36


def test_positions_that_were_learned_for_one_size_take_no_other(
    home: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """AIMv2 does not stretch them; those of its native towers are sines, which know any place."""
    other = replace(SPEC, image_size=24)
    with pytest.raises(UserError, match=r"pictures of 16 pixels.\n  cure: data\.image_size=16$"):
        config_of("vision", home[0] / "aimv2", interpolate=True).build(other)
    native = tmp_path / "native"
    shutil.copytree(home[0] / "aimv2", native)
    write(native, is_native=True)
    assert config_of("vision", native, weights="random").build(other).vision.tokens_per_view == 36


def test_what_a_hubs_file_leaves_out_is_its_kinds_default(tmp_path: Path) -> None:
    """google/siglip-base-patch16-224 says no more of its pictures than model_type."""
    said = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    tower = config_of("vision", tmp_path).towers()["vision"]
    assert tower.all_values()["patch_size"] == 16 and tower.picture_size() == 224  # pyright: ignore
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    (tmp_path / "preprocessor_config.json").write_text('{"crop_size": {"height": 288, "width": 288}}')
    found = load_config(
        None, [f"model.vision={{kind: pretrained, path: {tmp_path}}}", "data.image_size=auto"]
    )
    assert found.data.image_size == 288 and "image_size: 288" in to_yaml(found)
    with pytest.raises(UserError, match=r"image_size is auto.*no such tower"):
        load_config(None, ["data.image_size=auto"])


def test_a_transformers_whose_parts_have_other_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyproject.toml asks for the oldest that Tutti takes, in every extra."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    asked = re.findall(r"transformers>=(\d+)\.(\d+)", project.read_text())
    assert {tuple(map(int, one)) for one in asked} == {OLDEST}
    save_tower(tmp_path / "siglip", "siglip")
    monkeypatch.setattr(transformers("test"), "__version__", "5.8.1")
    with pytest.raises(UserError, match=r"is 5\.8\.1\.\n  expected: 5\.9 or later.*\n  cure: pip install"):
        config_of("vision", tmp_path / "siglip").build(SPEC)


def test_a_name_of_the_hub_is_found_in_its_cache_and_fetched_with_consent_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    place = tmp_path / "models--own--tiny"
    save_tower(place / "snapshots" / "abc", "dinov2")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub_folder.cache_clear()
    config = config_of("vision", Path("hf:own/tiny"), learn="none")
    assert loaded(config).vision.tower.loaded.tensors == 60  # pyright: ignore
    assert str(config.resolved().vision.path) == "hf:own/tiny"  # pyright: ignore
    with pytest.raises(
        UserError, match=r"hf:own/other, which is not in the local cache.\n  cure: tutti --download"
    ):
        config_of("vision", Path("hf:own/other")).build(SPEC)
    with pytest.raises(UserError, match="expected: hf:OWNER/NAME"):
        config_of("vision", Path("hf:../other")).build(SPEC)
    asked: list[Any] = []

    def fetch(name: str, **given: Any) -> str:
        asked.append((name, given["local_files_only"], huggingface_hub.constants.HF_HUB_OFFLINE))
        return str(place / "snapshots" / "abc")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setenv("TUTTI_DOWNLOAD", "1")
    assert config_of("vision", Path("hf:own/other")).build(SPEC).vision.tokens_per_view == 16
    assert asked == [("own/other", False, False)] and huggingface_hub.constants.HF_HUB_OFFLINE


def test_efficientnet_gives_a_map_at_stride_8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = EfficientNetLite0()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "efficientnet_lite0"}')
    part = loaded(config_of("vision", tmp_path, layer=3, learn="none")).vision
    assert (part.tokens_per_view, part.width) == (4, 40)
    x = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    y = net.stem(((x + 1) / 2 - 0.498) / 0.502)
    for stage in net.blocks[:3]:
        y = stage(y)
    torch.testing.assert_close(part.tokens(x), y.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    reference = nn.Sequential(nn.BatchNorm2d(4, eps=1e-3)).eval()
    for value in (*reference[0].parameters(), reference[0].running_mean, reference[0].running_var):
        nn.init.uniform_(value)  # pyright: ignore[reportArgumentType]
    expected = reference(pixels := torch.rand(1, 4, 2, 2))
    fix_batch_norms(reference)
    torch.testing.assert_close(reference(pixels), expected)


# --- strict loading


def drop(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def add(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})


def write(folder: Path, **keys: Any) -> None:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | keys))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: drop(f, "layernorm.bias"), r"lacks 1 tensors, such as layernorm\.bias"),
        (lambda f: add(f, "encoder.gate"), r"has beside it 1 tensors, such as encoder\.gate"),
        (
            lambda f: write(f, mlp_ratio=4),
            r"has another shape of \d+ tensors, such as encoder\.layer\.0\.mlp",
        ),
        (lambda f: write(f, model_type="yolos"), 'has model_type "yolos".\n  expected: one of siglip'),
        (lambda f: write(f, num_hidden_layers=5000), "asks for 5000 blocks; expected at most 512"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is not there"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "the weights cannot be loaded"),
        (lambda f: (f / "config.json").unlink(), r"config\.json is not there"),
    ],
)
def test_a_folder_that_is_not_the_tower_is_refused(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    save_tower(tmp_path, "dinov2")
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        loaded(config_of("vision", tmp_path))


def test_the_hash_is_kept_and_other_weights_are_refused(tmp_path: Path) -> None:
    save_tower(tmp_path, "bert")
    config = config_of("language", tmp_path).resolved()
    assert isinstance(config.language.architecture, dict) and len(config.language.sha256) == 64  # pyright: ignore
    loaded(config)
    (tmp_path / "config.json").unlink()  # a resolved config needs the weights alone
    loaded(config)
    add(tmp_path, "cls.more")
    with pytest.raises(UserError, match=r"expected: [0-9a-f]{64}, as model\.language\.sha256"):
        loaded(config)


# --- what learns


def trained(model: VLA, steps: int = 5) -> VLA:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5 / steps)
    model.train()
    for _ in range(steps):
        features = model(SEEN)
        (features.readout.square().sum() + features.vision.values.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_frozen_tower_stays_and_is_saved_nowhere(home: tuple[Path, dict[str, Any]]) -> None:
    config = config_of("vision", home[0] / "dinov2", learn="none")
    model = loaded(config)
    before = {name: value.clone() for name, value in model.vision.tower.outside().items()}  # pyright: ignore
    assert len(before) == 60 and not model.vision.tower.train().network.training  # pyright: ignore
    average = Ema(model, 0.5)
    trained(model, 20)
    average.update()
    after = model.vision.tower.outside()  # pyright: ignore
    assert all(value.equal(after[name]) and not after[name].requires_grad for name, value in before.items())
    state = model.state_dict()
    assert "vision.position" in state and not any("tower" in name for name in (*state, *average.shadow))
    again = loaded(config, tuple(state))
    again.load_state_dict(state)
    with torch.no_grad():
        told = model.eval()(SEEN).readout
        assert told.isfinite().all() and again(SEEN).readout.equal(told)


def test_a_frozen_tower_computes_each_picture_once(home: tuple[Path, dict[str, Any]]) -> None:
    """And the tokens do not depend on what was kept, or on the others of a batch."""
    path = home[0] / "dinov3"
    vision = loaded(config_of("vision", path, learn="none", remember=1)).vision
    plain = loaded(config_of("vision", path, learn="none")).vision
    calls: list[int] = []
    vision.tower.network.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    images, mask = torch.rand(3, 2, 3, SIZE, SIZE), torch.ones(3, 2, dtype=torch.bool)
    first = vision(images, mask).values
    assert len(calls) == 6
    again = vision(torch.cat([images[2:], images[:1], images[2:] + 1e-6]), mask).values
    assert len(calls) == 8 and again[0].equal(first[2]) and again[1].equal(first[0])
    torch.testing.assert_close(first, plain(images, mask).values)
    assert vision(images[:1], mask[:1]).values.equal(first[:1])
    vision.remembered.memory = 4 * 1024 / 2**20  # pyright: ignore
    vision.remembered.forget_others(-1)  # pyright: ignore
    vision(images, mask), vision(images, mask)
    assert len(vision.remembered.kept) == 4  # pyright: ignore
    with pytest.raises(ValueError, match="remember is for learn: none"):
        config_of("vision", path, remember=1)


@pytest.mark.parametrize("kind", ["bert", "t5", "clip-text", "llama"])
@pytest.mark.parametrize("num_tokens", [0, 4])
def test_a_frozen_tower_computes_each_text_once(
    home: tuple[Path, dict[str, Any]], kind: str, num_tokens: int
) -> None:
    """And its tokens do not depend on the padding, that is, on the others of a batch."""
    path, keys = home[0] / kind, {"learn": "none", "num_tokens": num_tokens}
    encoder = loaded(config_of("language", path, **keys, remember=1)).language
    plain = loaded(config_of("language", path, **keys)).language
    calls: list[int] = []
    encoder.tower.network.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    ids = torch.randint(4, 20, (4, 7))
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 0])[:, None]
    ids = torch.where(mask, ids, 0)
    found = encoder(ids, mask)
    assert len(calls) == 4 and found.mask.equal(plain(ids, mask).mask)
    expected = plain(ids, mask).values
    torch.testing.assert_close(found.values[found.mask], expected[found.mask], rtol=1e-5, atol=1e-5)
    short = encoder(ids[1:3, :3], mask[1:3, :3])
    exact = {} if num_tokens else {"rtol": 0, "atol": 0}  # the pooling reads the padding, at a weight of 0
    torch.testing.assert_close(short.values[0, :3], found.values[1, :3], **exact)
    assert len(calls) == 4
    assert encoder(ids[[1, 0, 1]], mask[[1, 0, 1]]).values[1].equal(found.values[0]) and len(calls) == 4
    with torch.autocast("cpu", torch.bfloat16):
        assert not encoder(ids, mask).values.equal(found.values) and len(calls) == 8
    assert encoder(ids, mask).values.equal(found.values) and len(calls) == 8
    with pytest.raises(ValueError, match="remember is for learn: none"):
        config_of("language", path, remember=1)


@pytest.mark.parametrize("socket", ["vision", "language"])
def test_what_a_tower_remembers_is_of_the_weights_that_it_has(
    home: tuple[Path, dict[str, Any]], socket: str
) -> None:
    config = config_of(
        socket, home[0] / {"vision": "dinov3", "language": "bert"}[socket], learn="none", remember=1
    )
    model, random = loaded(config), config.build(SPEC).eval()
    expected, before = model(SEEN).readout, random(SEEN).readout
    random.load_state_dict(model.state_dict())
    load_towers(random)
    assert random(SEEN).readout.equal(expected) and not before.equal(expected)
    part = getattr(random, socket)
    kept = dict(part.remembered.kept)
    random.load_state_dict(model.state_dict())  # without the tower, which is that of the folder
    assert random(SEEN).readout.equal(expected) and kept and part.remembered.kept == kept


def test_features_on_disk_serve_other_runs_to_the_last_bit(
    home: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTTI_CACHE", str(tmp_path))
    keys: dict[str, Any] = {"learn": "none", "layer": [1, 3]}
    config = config_of("vision", home[0] / "dinov3", **keys, cache=1)
    images, mask = torch.rand(3, 2, 3, SIZE, SIZE), torch.ones(3, 2, dtype=torch.bool)
    alone = loaded(config_of("vision", home[0] / "dinov3", **keys, remember=1)).vision
    expected = alone(images, mask).values
    first = loaded(config).train().vision
    assert first(images, mask).values.equal(expected)

    def other(**more: Any) -> tuple[Any, list[int]]:
        """Another run, which says when it computes."""
        calls: list[int] = []
        vision = (
            loaded(config_of("vision", home[0] / "dinov3", **(keys | {"cache": 1} | more))).train().vision
        )
        vision.tower.network.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
        return vision, calls

    second, calls = other()
    assert second(images.flip(0), mask).values.equal(expected.flip(0))
    assert len(calls) == 1  # the shape of a record is looked at once
    first(images[:1] / 2, mask[:1])  # while the other is open
    assert second(images[:1] / 2, mask[:1]).values.equal(alone(images[:1] / 2, mask[:1]).values)
    (folder,) = (one for one in (tmp_path / "features").iterdir())
    assert folder.name.startswith("dinov3_vit-16px-")
    records = (folder / "keys.bin").stat().st_size // 20
    assert (
        records == 8 and (folder / "tokens.f32").stat().st_size == 8 * 16 * 32 * 4 == 8 * second.record_bytes
    )
    second.eval()(images + 0.25, mask)
    assert (folder / "keys.bin").stat().st_size // 20 == records  # a policy that acts adds nothing
    apart, calls = other(layer=2)
    apart(images, mask)
    assert len(calls) == 7 and len(list((tmp_path / "features").iterdir())) == 2

    damaged = bytearray((folder / "tokens.f32").read_bytes())
    damaged[100] ^= 1
    (folder / "tokens.f32").write_bytes(damaged)
    (folder / "keys.bin").write_bytes((folder / "keys.bin").read_bytes() + b"half")
    third, calls = other()
    assert third(images, mask).values.equal(expected) and len(calls) == 2
    third(images + 0.5, mask)
    assert other()[0](images + 0.5, mask).values.equal(alone(images + 0.5, mask).values)

    names = [one.name for one in entries(tmp_path)]
    assert len(names) == 2 and f"features/{folder.name}" in names
    evict(tmp_path, f"features/{folder.name}")
    assert not folder.exists() and len(entries(tmp_path)) == 1
    with pytest.raises(UserError, match="has no cache 'features/no'"):
        evict(tmp_path, "features/no")


def test_features_on_disk_are_of_one_architecture_and_one_transformers(
    home: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights under another config.json give other tokens."""
    monkeypatch.setenv("TUTTI_CACHE", str(tmp_path / "cache"))
    other = shutil.copytree(home[0] / "dinov3", tmp_path / "other")
    write(other, layer_norm_eps=0.5)
    given = torch.rand(1, 2, 3, SIZE, SIZE), torch.ones(1, 2, dtype=torch.bool)
    own, changed = (
        loaded(config_of("vision", path, learn="none", cache=1)).train().vision
        for path in (home[0] / "dinov3", other)
    )
    assert not own(*given).values.equal(changed(*given).values)
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 2
    monkeypatch.setattr(transformers("test"), "__version__", "5.99")
    own(*given)
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 3


def test_a_policy_that_acts_writes_no_features_and_an_emptied_file_holds_none(
    home: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTTI_CACHE", str(tmp_path / "cache"))
    config = config_of("vision", home[0] / "dinov3", learn="none", cache=1)
    given = torch.rand(1, 2, 3, SIZE, SIZE), torch.ones(1, 2, dtype=torch.bool)
    vision = loaded(config).vision
    expected = vision(*given).values
    assert not (tmp_path / "cache").exists()
    assert vision.train()(*given).values.equal(expected)  # what acted before may write now
    (folder,) = (tmp_path / "cache" / "features").iterdir()
    for damage in (lambda file: file.write_bytes(b""), lambda file: file.unlink()):
        damage(folder / "tokens.f32")
        assert loaded(config).vision(*given).values.equal(expected)


def test_ranks_with_other_frozen_weights_or_colours_are_told(home: tuple[Path, dict[str, Any]]) -> None:
    said: list[Any] = []

    class Gathered(World):
        """All that have asked before are other ranks."""

        def all_gather(self, value: Any) -> list[Any]:
            said.append(value)
            return said

    path = home[0] / "dinov2"
    own, weights = (loaded(config_of("vision", path, learn="none")) for _ in range(2))
    colours = loaded(config_of("vision", path, learn="none", mean=(0.1, 0.2, 0.3)))
    with torch.no_grad():
        weights.vision.tower.network.layernorm.bias[0] += 1  # pyright: ignore
    for other, name in ((weights, r"vision\.tower\.network\.layernorm\.bias"), (colours, r"vision\.shift")):
        said.clear()
        for _ in range(2):
            require_equal(Gathered(), {"model": own})
        with pytest.raises(UserError, match=rf"1 of \d+ tensors, such as model\.{name}, differ"):
            require_equal(Gathered(), {"model": other})


@pytest.mark.parametrize(
    "kept",
    [("vision", "dinov3", "cache"), ("vision", "dinov3", "remember"), ("language", "bert", "remember")],
)
def test_flops_are_counted_as_if_nothing_was_kept_and_counting_keeps_nothing(
    home: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: tuple[str, str, str],
) -> None:
    """Else a study would give an arm the more steps of equal FLOPs, the more pictures others have left."""
    monkeypatch.setenv("TUTTI_CACHE", str(tmp_path))
    socket, name, keep = kept
    plain, model = (
        loaded(config_of(socket, home[0] / name, learn="none", **more)).train() for more in ({}, {keep: 1})
    )
    expected = describe(plain)
    assert describe(model) == expected and not (tmp_path / "features").exists()
    assert not getattr(model, socket).remembered.kept
    for _ in range(2):
        model(blank_observation(SPEC, torch.device("cpu")))
    assert getattr(model, socket).remembered.kept or (tmp_path / "features").exists()
    assert describe(model) == expected


def test_features_are_not_kept_of_what_changes(home: tuple[Path, dict[str, Any]]) -> None:
    path = home[0] / "dinov3"
    for keys, why in (
        ({}, "cache is for learn: none"),
        ({"learn": "none", "weights": "random"}, "pretrained"),
    ):
        with pytest.raises(ValueError, match=why):
            config_of("vision", path, cache=1, **keys)
    tower = f"{{kind: pretrained, path: {path}, learn: none, cache: 9}}"
    with pytest.raises(
        UserError, match=r"cache keeps .*augmentation.kind is colour.*Set model.vision.cache=0"
    ):
        load_config(None, [f"model.vision={tower}", "data.image_size=auto", "data.augmentation.kind=colour"])


def test_random_weights_begin_beside_the_same_rest_and_are_saved(home: tuple[Path, dict[str, Any]]) -> None:
    path = home[0] / "dinov2"
    own, control = (
        loaded(config_of("vision", path, learn="none", weights=weights))
        for weights in ("pretrained", "random")
    )
    theirs = control.state_dict()
    assert all(value.equal(theirs[name]) for name, value in own.state_dict().items())
    assert sum("tower" in name for name in theirs) == 60
    assert not any(p.requires_grad for p in control.vision.tower.parameters())  # pyright: ignore


@pytest.mark.parametrize(("socket", "name"), [("vision", "dinov3"), ("language", "t5")])
def test_lora_begins_as_the_tower_and_an_export_merges_it(
    home: tuple[Path, dict[str, Any]], socket: str, name: str
) -> None:
    base = loaded(config_of(socket, home[0] / name, learn="none"))
    config = config_of(socket, home[0] / name, learn={"lora": 2})
    model = loaded(config)
    assert model(SEEN).readout.equal(base(SEEN).readout)
    (part,) = pretrained_parts(model).values()
    learning = {n for n, p in part.tower.named_parameters() if p.requires_grad}
    assert learning and all(n.endswith((".down", ".up")) for n in learning)
    trained(model)
    assert not model.eval()(SEEN).readout.equal(base(SEEN).readout)
    shared, tensors = exported(config, SPEC, model.state_dict())
    assert shared.towers()[socket].learn == "none" and not any(n.endswith(".up") for n in tensors)
    served = config.model_copy(update={socket: config.towers()[socket].resolved().exported()})
    plain = loaded(served, tuple(tensors))
    plain.load_state_dict(tensors)
    with torch.no_grad():
        torch.testing.assert_close(plain(SEEN).readout, model(SEEN).readout, atol=1e-6, rtol=1e-6)


def test_rates_decay_from_block_to_block_of_a_tower_and_not_in_what_is_new(
    home: tuple[Path, dict[str, Any]],
) -> None:
    """Three blocks of each kind, under whatever names; view vectors and queries learn at the full rate."""
    rates = RatesConfig(layer_decay=0.5)
    for name in (*VISION, *LANGUAGE):
        socket = "vision" if name in VISION else "language"
        keys = {} if socket == "vision" else {"num_tokens": 2, "heads": 2}
        every = rates.factors(config_of(socket, home[0] / name, **keys).build(SPEC), nn.Identity())
        factors = {key: value for key, value in every.items() if key.startswith(f"model.{socket}.")}
        tower = {value for key, value in factors.items() if ".tower." in key}
        assert tower >= {0.25, 0.5, 1.0} and tower <= {0.125, 0.25, 0.5, 1.0}, name
        new = [value for key, value in factors.items() if ".tower." not in key]
        assert new and {*new} == {1.0}, name


def test_blocks_of_a_tower_are_recomputed_to_the_same_bits(home: tuple[Path, dict[str, Any]]) -> None:
    for socket, name in (("vision", "siglip"), ("language", "llama"), ("language", "t5")):
        gradients: list[list[torch.Tensor]] = []
        for again in (False, True):
            model = loaded(config_of(socket, home[0] / name))
            (part,) = pretrained_parts(model).values()
            blocks = blocks_of(part.tower)
            assert len(blocks) == 3
            for block in blocks:
                block.recompute = again
            model(SEEN).readout.sum().backward()
            gradients.append([p.grad for p in part.tower.parameters() if p.grad is not None])
        assert len(gradients[0]) > 20
        assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


# --- its tokenizer


def test_the_towers_own_tokenizer_reads_the_texts(tmp_path: Path) -> None:
    save_tower(tmp_path, "clip-text")
    config = config_of("language", tmp_path, template="In: {instruction} move")
    source = config.text_source
    assert source is not None and (source.around, source.longest) == (("In: ", " move"), 12)
    made = Tokenizer.from_folder(tmp_path, ["Go to the RED square"], around=("", " move"), longest=12)
    ids, mask = made.encode(["go to  the red square", "", "the jar"])
    assert ids[0, :8].tolist() == [2, 4, 5, 6, 7, 9, 10, 3] and ids[2, :5].tolist() == [2, 6, 1, 10, 3]
    assert mask.sum(dim=1).tolist() == [8, 0, 5] and made.vocab_size == 12
    assert made.unknown_share(["the jar"]) == 0.2
    again = Tokenizer.from_json(made.to_json())
    assert again.encode(["go"])[0].equal(made.encode(["go"])[0]) and again.to_json() == made.to_json()
    cut = Tokenizer.from_folder(tmp_path, ["go"], text_length=4)
    assert cut.encode(["go to the red"])[0].tolist() == [[2, 4, 5, 3]]
    with pytest.raises(UserError, match="two instructions are the same: 'go to the' and 'go to the red'"):
        Tokenizer.from_folder(tmp_path, ["go to the", "go to the red"], text_length=4)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer of the tokenizers library"):
        Tokenizer.from_folder(tmp_path, ["go"])
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="expected: the tower's tokenizer"):
        Tokenizer.from_folder(tmp_path, ["go"])
