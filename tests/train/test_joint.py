"""Medusa-2: the loss, what moves and what does not, the merged model, and that it is worth it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import forerun
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting import registry
from forerun.drafting.planned import NAME as PLAN
from forerun.drafting.trained import Adversary, Weights
from forerun.errors import CheckpointError, DrafterError, TrainingError
from forerun.nn.load import load_network
from forerun.nn.save import save_beside, save_pretrained
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.sampling import SamplingParams
from forerun.sources import hugging_face
from forerun.sources.source import Source
from forerun.train import drafters, joint
from forerun.train import run as loop
from forerun.train.answers import Batch
from forerun.train.joint import JointRecipe, JointTraining, Ramp
from forerun.train.lora import Adapters, LowRank
from forerun.train.objectives import joint as objectives
from forerun.train.objectives.descent import Descent
from forerun.train.run import Run, Watch, unwatched
from forerun.train.schedule import Schedule

MEDUSA = registry.trained()["medusa"]

CPU = torch.device("cpu")
V, HEADS = 16, 5
SHAPE = TransformerConfig(
    vocab_size=V, width=48, layers=2, heads=4, kv_heads=2, head_dim=12, mlp_width=96, max_length=256, tied=True
)
DECAYED = sum(0.8**k for k in range(1, HEADS + 1))
FILES = {"generation_config.json": '{"eos_token_id": 99}\n', "chat_template.jinja": "{{ messages }}", "notes.bin": "no"}


def sequences(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """x_{t+1} = table[x_{t-1}, x_t]: what a head must know of the tokens between is not in the last token alone."""
    table = torch.randint(0, V, (V, V), generator=torch.Generator().manual_seed(0))
    x = torch.randint(0, V, (rows, length), generator=generator)
    for t in range(2, length):
        x[:, t] = table[x[:, t - 2], x[:, t - 1]]
    return x


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama that has nearly learnt the table."""
    network, steps, luck = Transformer(SHAPE).initialise(0), 150, torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(network.parameters())
    for step in range(steps):
        x = torch.cat([sequences(16, 6, luck) for _ in range(8)], 1)
        logits = F.linear(network.features(x[:, :-1]), network.head.weight)
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * max(0.02, 1 - step / steps)
        optimiser.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("joint") / "target"
    save_pretrained(network, folder, {"eos_token_id": 99, "pad_token_id": 3}, dtype=torch.float32)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def engine(model: Path, drafter: str = "none") -> forerun.Engine:
    return forerun.load(str(model), drafter=drafter, dtype="fp32", kernels="torch")


@pytest.fixture(scope="session")
def data(target: Path) -> Path:
    luck = torch.Generator().manual_seed(1)
    prompts = [sequences(1, 3, luck)[0].tolist() for _ in range(240)]
    answers = engine(target).generate(prompts, SamplingParams(max_new_tokens=24))
    rows = [{"prompt": p, "answer": a.token_ids} for p, a in zip(prompts, answers, strict=True)]
    path = target.parent / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prepared(target: Path, data: Path):
    """A joint training with the given settings."""

    def make(
        keep: str = "original",
        steps: int = 4,
        rate: float = 1e-3,
        head_rate: float | None = None,
        init_from: Path | None = None,
        dtype: str = "fp32",
        architecture: dict[str, object] | None = None,
        **settings: object,
    ) -> JointTraining:
        preset = MEDUSA.joint.presets[keep]
        schedule = joint.schedule_for(preset, steps, rate, head_rate, validate_every=steps, save_every=2)
        source = None if init_from is None else str(init_from)
        heads = drafters.HeadsRecipe(
            "medusa", str(target), data, architecture or {}, None, schedule, 8, 64, 0, source, dtype
        )
        recipe = JointRecipe(heads, keep, preset.head_weight, preset.ramp)
        return joint.prepare(replace(recipe, **settings), CPU)

    return make


def medusa1(
    target: Path, data: Path, folder: Path, steps: int, heads: int = HEADS, rate: float = 3e-3
) -> dict[str, float]:
    schedule = drafters.schedule_for(MEDUSA.presets["medusa"], steps, rate, validate_every=steps)
    recipe = drafters.HeadsRecipe(
        "medusa", str(target), data, {"heads": heads}, None, schedule, 8, 64, dtype="fp32", start_batches=0
    )
    return drafters.prepare(recipe, CPU).fit(folder.with_suffix(".run"), folder)


def batch_of(training: JointTraining) -> Batch:
    return training.objective.heads.answers.batch(0)


def logits(network: Transformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return F.linear(network.features(tokens), network.output_head)


def stirred(training: JointTraining) -> None:
    """As if the adapters had learnt something."""
    for part in training.objective.module.backbone.parts:
        assert isinstance(part, LowRank)
        nn.init.normal_(part.up, std=0.3, generator=torch.Generator().manual_seed(5))


# ---- the loss


def test_ramps():
    values = {
        "constant": (1, 1, 1),
        "linear": (0, 0.5, 0.75),
        "sine": (0, math.sqrt(0.5), math.sin(0.375 * math.pi)),
        "sine:0.5": (0, 1, 1),
        "sine:1": (0, math.sqrt(0.5), math.sin(0.375 * math.pi)),
    }
    for word, expected in values.items():
        assert [Ramp.named(word).at(progress) for progress in (0, 0.5, 0.75)] == pytest.approx(expected), word
    for word in ("", "cosine", "sine:", "sine:x", "sine:0", "sine:1.5", "sine:nan", "linear:0.5", "constant:1"):
        with pytest.raises(TrainingError, match="write constant"):
            Ramp.named(word)


def test_the_loss_is_the_targets_cross_entropy_and_a_fifth_of_medusa1s(prepared):
    training = prepared("text")
    with torch.no_grad():
        training.objective.network.final_norm.zero_()  # every law is uniform then, the target's and the heads'
    terms = training.objective.terms(batch_of(training), compare=True)
    assert terms.text.item() == pytest.approx(math.log(V))
    assert terms.heads.item() == pytest.approx(math.log(V) * 2.68928, rel=1e-5) and pytest.approx(2.68928) == DECAYED
    assert terms.divergence.item() == 0
    assert training.objective.loss(0).item() == pytest.approx(math.log(V) * (1 + 0.2 * DECAYED))


@pytest.mark.parametrize("known", [0, 9])
def test_the_terms_are_those_of_the_slow_way(known, prepared):
    training = prepared(architecture={"known": known})
    kept = list(training.heads.config.kept or range(V))
    stirred(training)
    objective, batch = training.objective, batch_of(training)
    network, module, tokens = objective.network, objective.heads.module, batch.tokens_BN
    own = logits(network, tokens).log_softmax(-1)
    with objective.module.backbone.off():
        original = logits(network, tokens).log_softmax(-1)
    with torch.no_grad():
        states = network.features(tokens)
        heads = module.logits(states.flatten(0, 1), states.flatten(0, 1)[:, None], module.of_known(network.output_head))
        heads = heads.view(HEADS, *tokens.shape, len(kept)).log_softmax(-1)
    text, before, divergence, each = [], [], [], [[] for _ in range(HEADS)]
    for row, (begin, end) in enumerate(zip(batch.begins, batch.ends, strict=True)):
        for t in range(begin - 2, end):
            if begin <= t + 1 < end:
                text.append(-own[row, t, tokens[row, t + 1]].item())
                before.append(-original[row, t, tokens[row, t + 1]].item())
                divergence.append(F.kl_div(own[row, t], original[row, t], log_target=True, reduction="sum").item())
            for head in range(HEADS):
                if begin <= t + head + 2 < end and int(tokens[row, t + head + 2]) in kept:
                    each[head].append(-heads[head, row, t, kept.index(int(tokens[row, t + head + 2]))].item())
    terms = objective.terms(batch, compare=True)
    assert terms.text.item() == pytest.approx(np.mean(text), rel=1e-5)
    assert terms.original.item() == pytest.approx(np.mean(before), rel=1e-5) != terms.text.item()
    assert terms.divergence.item() == pytest.approx(np.mean(divergence), rel=1e-4) and terms.divergence.item() > 0.01
    expected = sum(0.8 ** (head + 1) * np.mean(losses) for head, losses in enumerate(each))
    assert terms.heads.item() == pytest.approx(expected, rel=1e-5)


def test_chunks_change_nothing(prepared, monkeypatch):
    training = prepared()
    stirred(training)
    batch, found = batch_of(training), []
    for numbers in (1 << 25, 13 * V * (HEADS + 2)):
        monkeypatch.setattr(objectives, "CHUNK_NUMBERS", numbers)
        terms = training.objective.terms(batch, compare=True)
        (terms.divergence + terms.heads).backward()
        gradients = [p.grad.clone() for p in training.objective.module.parameters()]
        training.objective.module.zero_grad()
        found.append((torch.stack((terms.text, terms.divergence, terms.heads)).detach(), gradients))
    (whole, gradients), (chunked, others) = found
    assert torch.allclose(whole, chunked, rtol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(gradients, others, strict=True))


def test_the_ramp_follows_the_steps_and_their_parts(prepared):
    training = prepared(steps=4, ramp="linear", head_weight=1.0)
    objective = training.objective
    objective.schedule = replace(objective.schedule, parts=2)
    for number in (0, 1, 2, 7):  # nothing has moved: the divergence is 0
        heads = objective.terms(objective.heads.answers.batch(number), compare=False).heads.item()
        assert objective.loss(number).item() == pytest.approx(number // 2 / 4 * heads)


def test_first_and_last_head_and_every_adapter_learn(prepared):
    training = prepared(ramp="constant")
    stirred(training)
    training.objective.loss(0).backward()
    heads = training.objective.heads.module
    assert all(heads.vocabulary.grad[k].abs().max() > 0 for k in (0, HEADS - 1))
    assert all(heads.blocks.grad[0, k].abs().max() > 0 for k in (0, HEADS - 1))
    for name, parameter in training.objective.module.backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


# ---- adapters


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_at_first_nothing_has_moved_and_without_adapters_nothing_ever_does(prepared, target, dtype):
    training = prepared(dtype=dtype)
    objective, batch = training.objective, batch_of(training)
    assert objective.terms(batch, compare=True).divergence.item() == 0
    untouched = load_network(target, objective.network.dtype, CPU)
    expected = logits(untouched, batch.tokens_BN)
    assert torch.equal(logits(objective.network, batch.tokens_BN), expected)
    stirred(training)
    assert not torch.equal(logits(objective.network, batch.tokens_BN), expected)
    with objective.module.backbone.off():
        assert torch.equal(logits(objective.network, batch.tokens_BN), expected)
    assert not torch.equal(logits(objective.network, batch.tokens_BN), expected)
    assert objective.terms(batch, compare=True).divergence.item() > 0


def test_every_published_matrix_has_an_adapter_of_its_own():
    network, rank = Transformer(SHAPE).initialise(0), 3
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    adapters = Adapters(network, rank, alpha=6.0)
    query_key_value_out, gate_up_down = 48 + 24 + 24 + 48 + 4 * 48, 3 * (96 + 48)
    numbers = rank * (SHAPE.layers * (query_key_value_out + gate_up_down) + V + 48)
    assert sum(p.numel() for p in adapters.parameters()) == numbers
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(p) for p in adapters.parameters()}
    for part in adapters.parts:
        nn.init.normal_(part.up)
    block = network.blocks[1]
    change = block.qkv.weight.detach() - before["blocks.1.qkv.weight"]
    ranks = [int(torch.linalg.matrix_rank(part, atol=1e-3)) for part in (*change.split([48, 24, 24]), change)]
    assert ranks == [3, 3, 3, 9]
    part = adapters.parts[0]
    expected = before["embedding.weight"] + 2.0 * part.up @ part.down[0]
    assert torch.allclose(network.head.weight, expected) and not network.config.tied
    assert torch.equal(network.embedding.weight, before["embedding.weight"])
    merged = {name: network.get_submodule(name).weight.detach().clone() for name in ("head", "blocks.0.down")}
    adapters.merge()
    assert [*dict(network.named_parameters())] == [*before, "head.weight"]
    assert all(torch.equal(network.get_parameter(f"{name}.weight"), value) for name, value in merged.items())


def test_the_backbone_moves_through_its_adapters_alone(prepared, target, tmp_path):
    training = prepared(steps=3, ramp="constant")
    fit(training.objective, training.recipe.heads.schedule, tmp_path)
    untouched = dict(load_network(target, torch.float32, CPU).named_parameters())
    untouched["head.weight"] = untouched["embedding.weight"]
    held = dict(training.objective.network.named_parameters())
    moved = {id(p) for p in training.objective.module.parameters()}
    originals = {
        n.replace("parametrizations.weight.original", "weight"): p for n, p in held.items() if id(p) not in moved
    }
    assert set(originals) == set(untouched)
    assert all(torch.equal(originals[name], weight) for name, weight in untouched.items())
    assert all(part.up.abs().max() > 0 for part in training.objective.module.backbone.parts)


# ---- the loop


def fit(objective: Descent, schedule: Schedule, folder: Path) -> dict[str, float]:
    """Train by this schedule."""
    objective.schedule = schedule
    return Run(objective, schedule, folder).finish("fit")


class Pair(Descent):
    """An objective over two parameters."""

    def __init__(self) -> None:
        self.batches = 0
        self.module = nn.ParameterDict({"slow": nn.Parameter(torch.ones(3)), "fast_bias": nn.Parameter(torch.ones(3))})

    def loss(self, number: int) -> Tensor:
        self.batches += 1
        return sum(((number + 2.0) * p).square().sum() for p in self.module.values())

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        return {"loss": 0.0}


SCALED = Schedule(1, warmup=0, decay=0, muon_rate=0, adam_rate=0.01, clip=1e9, save_every=1, scales=(("fast", 4.0),))


def test_a_prefix_learns_at_its_own_rate_biases_included(tmp_path):
    pair, plain = Pair(), Pair()
    fit(pair, SCALED, tmp_path)
    for name, rate in (("slow", 0.01), ("fast_bias", 0.04)):
        optimiser = torch.optim.AdamW([plain.module[name]], lr=rate, weight_decay=SCALED.weight_decay)
        plain.module.zero_grad()
        plain.loss(0).backward()
        optimiser.step()
        assert torch.equal(pair.module[name], plain.module[name]) and pair.module[name][0] < 1, name


def test_scaled_rates_survive_a_checkpoint_and_older_ones_still_resume(tmp_path):
    two = replace(SCALED, steps=2, save_every=1)
    whole = Pair()
    fit(whole, two, tmp_path / "whole")

    class Interrupted(Pair):
        def loss(self, number: int) -> Tensor:
            if number == 1:
                raise KeyboardInterrupt
            return super().loss(number)

    with pytest.raises(KeyboardInterrupt):
        fit(Interrupted(), two, tmp_path / "parts")
    parts = Pair()
    fit(parts, two, tmp_path / "parts")
    assert all(torch.equal(parts.module[name], whole.module[name]) for name in whole.module)
    with pytest.raises(TrainingError, match="another schedule"):
        fit(Pair(), replace(two, scales=(("fast", 2.0),)), tmp_path / "parts")

    old = replace(two, scales=())
    fit(Pair(), old, tmp_path / "old")
    note, state = loop.read_run(tmp_path / "old" / loop.STATE)
    del note["schedule"]["scales"]
    loop.save_file(state, tmp_path / "old" / loop.STATE, {"run": json.dumps(note)})
    again = Pair()
    assert fit(again, old, tmp_path / "old") == {"loss": 0.0} and again.batches == 0


def test_an_interrupted_run_ends_as_one_that_was_not(prepared, tmp_path, monkeypatch, capsys):
    prepared().fit(tmp_path / "whole.run", tmp_path / "whole")
    update, count = Descent.update, 0

    def interrupted(self, step):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return update(self, step)

    monkeypatch.setattr(Descent, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared().fit(tmp_path / "parts.run", tmp_path / "parts")
    assert "goes on from the last checkpoint" in capsys.readouterr().err and not (tmp_path / "parts").exists()
    monkeypatch.undo()
    prepared().fit(tmp_path / "parts.run", tmp_path / "parts")
    for name in ("model", "heads"):
        ours, theirs = (load_file(tmp_path / run / name / "model.safetensors") for run in ("parts", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    "other", [{"head_weight": 5.0}, {"ramp": "constant"}, {"alpha": 640.0}, {"keep": "text"}], ids=str
)
def test_a_run_of_other_settings_is_not_gone_on_with(prepared, tmp_path, other):
    prepared().fit(tmp_path / "run", tmp_path / "first")
    with pytest.raises(TrainingError, match=f"another {next(iter(other))}"):
        prepared(**other).fit(tmp_path / "run", tmp_path / "second")
    assert not (tmp_path / "second").exists()


# ---- the result


def test_the_merged_model_is_the_adapted_one_and_everyone_can_read_it(prepared, target, tmp_path):
    training, tokens = prepared(), sequences(3, 20, torch.Generator().manual_seed(9))
    stirred(training)
    adapted = logits(training.objective.network, tokens)
    training.objective.module.backbone.merge()
    training._write(tmp_path / "out", {"loss": 0.0})
    model = tmp_path / "out" / "model"
    assert torch.allclose(logits(load_network(model, torch.float32, CPU), tokens), adapted, atol=1e-5, rtol=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert torch.allclose(theirs(tokens).logits, adapted, atol=1e-4, rtol=1e-4)
    assert not theirs.config.tie_word_embeddings and theirs.config.pad_token_id == 3 and theirs.dtype == torch.float32
    for name, text in FILES.items():
        assert (model / name).read_text() == text if name != "notes.bin" else not (model / name).exists()
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in model.iterdir())
    heads = checkpoints.read(tmp_path / "out" / "heads")
    assert (heads.target, heads.training["original"]) == ("out/model", "target")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FAMILIES = {
    "mistral, no window": (transformers.MistralConfig, {"sliding_window": None}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 4}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "llama, long": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, "attention_bias": True},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_merged_and_written(name, tmp_path):
    kind, options = FAMILIES[name]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = kind(vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, **sizes, **options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "original")
    network, tokens = load_network(tmp_path / "original", torch.float32, CPU), torch.arange(12)[None]
    adapters = Adapters(network, rank=2)
    for part in adapters.parts:
        nn.init.normal_(part.up, std=0.3)
    adapted = logits(network, tokens)
    adapters.merge()
    (tmp_path / "original" / PLAN).write_text("{}")
    save_beside(network, Source.of(tmp_path / "original"), tmp_path / "model")
    assert not (tmp_path / "model" / PLAN).exists()  # it is true of the original alone
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")(tokens).logits
        before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "original")(tokens).logits
    assert torch.allclose(theirs, adapted, atol=1e-5) and not torch.allclose(before, adapted, atol=1e-2)


def test_what_it_says_is_exactly_what_the_merged_model_says(prepared, tmp_path):
    training = prepared(steps=10, rate=5e-3, ramp="constant", head_weight=0.2)
    training.fit(tmp_path / "out.run", tmp_path / "out")
    model, luck = tmp_path / "out" / "model", torch.Generator().manual_seed(3)
    prompts = [sequences(1, 4, luck)[0].tolist() for _ in range(30)]
    params = SamplingParams(max_new_tokens=40)
    plain = engine(model).generate(prompts, params)
    drafted = engine(model, f"medusa:{tmp_path / 'out' / 'heads'}").generate(prompts, params)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    assert sum(one.stats.steps for one in drafted) < sum(one.stats.steps for one in plain)


def test_an_older_result_is_replaced(prepared, tmp_path):
    prepared(steps=1).fit(tmp_path / "first.run", tmp_path / "out")
    (tmp_path / "out" / "heads" / "tree.json").write_text("of the older heads")
    prepared(steps=2).fit(tmp_path / "second.run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.run", "out", "second.run"]
    assert sorted(path.name for path in (tmp_path / "out").rglob("tree.json")) == []
    assert checkpoints.read(tmp_path / "out" / "heads").training["schedule"]["steps"] == 2


def test_a_result_that_finds_no_room_leaves_nothing(prepared, tmp_path, monkeypatch):
    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hugging_face.shutil, "copyfile", full)
    with pytest.raises(TrainingError, match=r"out cannot be written \(No space left"):
        prepared(steps=1).fit(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_joint_training_accepts_more_than_heads_alone_in_as_many_steps(prepared, target, data, tmp_path):
    """The table needs two tokens, so heads that read one state must guess unless the target helps.
    Two stages of 100 steps against 200 steps of heads alone, at the same rate for the heads."""
    alone = medusa1(target, data, tmp_path / "alone", 200)
    medusa1(target, data, tmp_path / "first", 100)
    settings = {"steps": 100, "rate": 2e-3, "head_rate": 1.5, "head_weight": 0.1}
    figures = prepared(init_from=tmp_path / "first", **settings).fit(tmp_path / "run", tmp_path / "out")
    assert figures["divergence"] < 0.02
    assert figures["tokens_per_step"] > alone["tokens_per_step"] + 0.1

    def measured(model: Path, heads: Path) -> float:
        luck = torch.Generator().manual_seed(7)
        prompts = [sequences(1, 3, luck)[0].tolist() for _ in range(60)]
        outputs = engine(model, f"medusa:{heads}").generate(prompts, SamplingParams(max_new_tokens=24))
        return sum(one.stats.new_tokens for one in outputs) / sum(one.stats.steps for one in outputs)

    assert measured(tmp_path / "out/model", tmp_path / "out/heads") > measured(target, tmp_path / "alone")


# ---- what goes in


def test_it_begins_with_heads_that_were_trained_before_whatever_their_shape(prepared, target, data, tmp_path):
    medusa1(target, data, tmp_path / "three", 2, heads=3)
    training = prepared(init_from=tmp_path / "three")
    trained = load_file(tmp_path / "three" / "model.safetensors")
    own = dict(training.objective.heads.module.named_parameters())
    assert own.keys() == trained.keys() and len(own["vocabulary"]) == 3
    assert all(torch.equal(own[name], value.float()) for name, value in trained.items())
    with pytest.raises(CheckpointError, match="wrong shape"):
        prepared(init_from=tmp_path / "three", architecture={"heads": 4})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        prepared(init_from=tmp_path / "none")
    about = json.loads((tmp_path / "three" / "config.json").read_text())
    (tmp_path / "three" / "config.json").write_text(json.dumps(about | {"drafter": "hydra"}))
    with pytest.raises(DrafterError, match="hydra"):
        prepared(init_from=tmp_path / "three")


def test_heads_that_share_the_targets_projection(prepared, tmp_path):
    training = prepared(architecture={"vocabulary": "shared"}, ramp="constant")
    training.fit(tmp_path / "out.run", tmp_path / "out")
    assert sorted(load_file(tmp_path / "out" / "heads" / "model.safetensors")) == ["biases", "blocks"]


def test_heads_have_no_adversary_beside_a_target_that_moves():
    heads = drafters.HeadsRecipe("medusa", "t", Path("d"), {}, None, Schedule(1), adversary=Adversary())
    with pytest.raises(TrainingError, match="adversary"):
        JointRecipe(heads)


def test_other_networks_are_refused_before_they_are_read(prepared, target, data, tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path / "gpt2")
    heads = prepared().recipe.heads
    with pytest.raises(TrainingError, match=r"not a Llama, Mistral or Qwen.*forerun train medusa"):
        joint.prepare(JointRecipe(replace(heads, target=str(tmp_path / "gpt2"))), CPU)
    with pytest.raises(TrainingError, match="original or text"):
        joint.prepare(JointRecipe(heads, keep="both"), CPU)


def test_the_papers_settings():
    original, text = MEDUSA.joint.presets["original"], MEDUSA.joint.presets["text"]
    assert (original.head_weight, original.ramp, original.heads.rate, original.heads.warmup) == (0.01, "sine", 1e-4, 20)
    assert (text.head_weight, text.ramp, text.heads.rate, text.heads.warmup) == (0.2, "constant", 5e-4, 40)
    for preset in MEDUSA.joint.presets.values():
        assert (preset.rank, preset.alpha, preset.head_rate, preset.heads.weights) == (32, 16, 4, Weights(decay=0.8))
        assert preset.heads.architecture == {"heads": 5, "layers": 1}
        schedule = joint.schedule_for(preset, 1000, None, None)
        assert (schedule.shape, schedule.scales, schedule.adam_rate) == (
            "cosine",
            (("heads.", 4.0),),
            preset.heads.rate,
        )
