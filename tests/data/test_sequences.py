"""Tasks of tokens: what is asked stands in the sequence, and nowhere else; and one is learned."""

import numpy as np
import pytest
import torch
from small_training import split

from tab.data.dataset import Dataset
from tab.data.load import load_dataset
from tab.data.sequences import BLANK, TASKS, VALUES, SequenceBatches, draw, parse
from tab.data.splits import split_batches
from tab.layers import get_attention, layer_names
from tab.models.image_model import build_model
from tab.recipe.recipe import load_recipe
from tab.train.loop import load_model, train
from tab.train.steps import asked
from tab.train.together import train_seeds

N = 16
SMALL = {
    **{"model.tokens.tokens": N, "model.tokens.hidden": 32, "model.tokens.match": ""},
    **{"attention.linformer.tokens.k": 4, "data.validation": 100, "train.batch_size": 50},
}
tasks = pytest.mark.parametrize("task", TASKS)


def config_of(attention="multi_head", seed=0, **overrides):
    given = {k.replace("__", "."): v for k, v in overrides.items()}
    return load_recipe("recall", {**SMALL, **given}).run_config("tokens", attention, seed)


@tasks
def test_drawn_from_the_seed_alone(task):
    one, two, test = (draw(task, N, 50, stream=stream) for stream in (0, 0, 1))
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.labels, two.labels)
    assert not torch.equal(one.tokens, test.tokens)
    assert one.tokens.shape == (50, N, 2)
    assert one.tokens[..., 0].max() <= N and one.tokens[..., 1].max() <= BLANK
    assert one.labels.min() >= 0 and one.labels.max() < VALUES


@pytest.mark.parametrize(("task", "pairs"), [("recall", N // 2), ("needle", N - 1)])
@pytest.mark.parametrize("stream", [0, 1])
def test_each_question_has_one_answer_and_it_is_the_label(task, pairs, stream):
    found, held = draw(task, N, 300, stream=stream), []
    for tokens, labels in zip(found.tokens.tolist(), found.labels.tolist(), strict=True):
        given, questions = [t for t in tokens[:pairs] if t != [0, BLANK]], tokens[pairs:]
        known = dict(given)
        held.append(len(known))
        assert len(known) == len(given) and 0 not in known and BLANK not in known.values()
        assert [known[key] for key, _ in questions] == labels
        assert all(value == BLANK for _, value in questions)
        asked = [key for key, _ in questions]  # each about as often
        assert max(map(asked.count, known)) - min(map(asked.count, known)) <= 1
    assert {*held} == ({*range(1, pairs + 1)} if stream == 0 else {pairs})
    # At every place of the sequence it is asked for, and the answers are spread evenly.
    places = {t[:pairs].index(t[pairs]) for t in found.tokens[..., 0].tolist()}
    assert len(places) == pairs
    assert np.bincount(found.labels.flatten()).min() > 0.3 * found.labels.numel() / VALUES


def test_blanks_add_nothing():
    net = build_model(config_of("none"), VALUES)
    x = torch.tensor([[[0, BLANK], [3, BLANK], [0, 5], [3, 5]]])
    nothing, key, value, both = net.backbone(x)[0]
    assert not nothing.any() and torch.equal(both, key + value) and key.any() and value.any()


def test_copy_asks_for_what_stood_half_the_length_before():
    found = draw("copy", N, 20, stream=0)
    assert torch.equal(found.tokens[:, : N // 2, 1], found.labels)
    assert (found.tokens[:, N // 2 :, 1] == BLANK).all() and not found.tokens[..., 0].any()


def test_names_and_sizes():
    assert parse("recall") == ("recall", 64, 20000, 2000)
    assert parse("copy:256") == ("copy", 256, 20000, 2000)
    assert parse("needle:1024:500/20") == ("needle", 1024, 500, 20)
    dataset = load_dataset("recall:16:30/10")
    assert (len(dataset.train), len(dataset.test), len(dataset.classes)) == (30, 10, VALUES)
    assert dataset.sequences and "8 of them questions" in dataset.note
    assert dataset.fingerprint == load_dataset("recall:16:30/10").fingerprint
    assert dataset.fingerprint != load_dataset("copy:16:30/10").fingerprint
    assert ("questions", "8 in each, 16 answers") in dataset.facts()
    for spec in ("recall:15", "recall:2", "recall:16:0/5", "recall:16:a/b", "copy:", "needle:16:5"):
        with pytest.raises(ValueError, match="recall"):
            load_dataset(spec)


def test_order_is_a_function_of_seed_and_epoch():
    found = draw("recall", N, 23, stream=0)
    batches = SequenceBatches(found, batch_size=5, seed=3, shuffle=True)
    orders = [torch.cat([x for x, _ in batches.epoch(epoch)]) for epoch in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert (len(batches), batches.samples, batches.answers) == (5, 23, 23 * 8)
    for seed in (-(2**63), 2**63 - 1):
        assert (
            len(list(SequenceBatches(found, batch_size=5, seed=seed, shuffle=True).epoch(1))) == 5
        )
    dropped = SequenceBatches(found, batch_size=5, drop_last=True)
    assert (len(list(dropped.epoch(0))), dropped.samples) == (4, 20)
    with pytest.raises(ValueError, match="no batch: 23 sequences, batch_size 50"):
        SequenceBatches(found, batch_size=50, drop_last=True)


def test_only_the_last_places_are_asked(generator):
    logits, y = torch.randn(3, 8, 5, generator=generator), torch.zeros(3, 2, dtype=torch.int64)
    of, flat = asked(logits, y)
    assert torch.equal(of, logits[:, 6:].reshape(6, 5)) and flat.shape == (6,)
    assert asked(logits[:, 0], y[:, 0])[0] is not None  # of images: as it is
    assert torch.equal(asked(logits[:, 0], y[:, 0])[0], logits[:, 0])


@pytest.mark.filterwarnings("ignore")  # flex says that it is dense
@pytest.mark.parametrize("attention", layer_names())
def test_every_layer_reads_sequences(attention):
    found = draw("recall", N, 60, stream=0)
    net = build_model(config_of(attention), VALUES)
    logits = net(found.tokens)
    assert logits.shape == (60, N, VALUES)
    of, y = asked(logits, found.labels)
    torch.nn.functional.cross_entropy(of, y).backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # Places that ask hold no value: where no token meets another, values have no part.
    mixes = get_attention(attention).mixes_tokens
    assert idle == ([] if mixes else ["backbone.values.weight"])


def test_a_model_reads_what_it_is_made_for():
    cpu = torch.device("cpu")
    sequences = load_dataset("recall:16:200/20")
    images = Dataset("tiny", tuple("abcdefghij"), split(100, 1), split(20, 2), "drawn", "0")
    with pytest.raises(ValueError, match=r"of sequences, which the model cnn does not read"):
        split_batches(load_recipe("study").run_config("cnn", "none", 0), sequences, cpu)
    with pytest.raises(ValueError, match=r"of images, which the model tokens does not read"):
        split_batches(config_of(), images, cpu)
    with pytest.raises(ValueError, match=r"has 16 tokens, the model 64: give --set model.tokens"):
        split_batches(config_of(model__tokens__tokens=64), sequences, cpu)
    with pytest.raises(ValueError, match=r"not moved, mirrored or cut out"):
        split_batches(config_of(data__flip=True), sequences, cpu)
    with pytest.raises(ValueError, match=r"give 1 to 199 to hold out"):
        split_batches(config_of(data__validation=200), sequences, cpu)
    with pytest.raises(ValueError, match=r"recipe fair has no \[model.tokens\].*recall"):
        load_recipe("fair").run_config("tokens", "none", 0)
    batches, validation, test = split_batches(config_of(), sequences, cpu)
    assert (batches.samples, validation.samples, test.samples) == (100, 100, 20)


def test_attention_recalls_and_the_control_does_not(tmp_path, one_thread):
    """Chance is 1/16. Scores are of answers, and every answer is kept."""
    dataset = load_dataset("recall:16:2100/100")
    scores = {}
    for attention in ("none", "multi_head"):
        config = config_of(attention, train__epochs=4, train__lr=0.01)
        outcome = train(config, dataset, tmp_path / attention)
        scores[attention] = outcome.rows[-1]["test_accuracy"]
        with np.load(tmp_path / attention / "test.npz") as kept:
            assert kept["label"].shape == (800,)
            right = (kept["predicted"] == kept["label"]).mean()
        assert right == pytest.approx(scores[attention])
    assert scores["none"] < 0.12 and scores["multi_head"] > 0.9
    net = load_model(tmp_path / "multi_head")
    of, y = asked(net(dataset.test.tokens), dataset.test.labels)
    assert (of.argmax(-1) == y).float().mean().item() == pytest.approx(scores["multi_head"])


def test_seeds_at_once(tmp_path, one_thread):
    dataset = load_dataset("recall:16:200/20")
    configs = [config_of(seed=seed, train__epochs=2) for seed in range(2)]
    alone = [train(c, dataset, tmp_path / "alone" / c.id) for c in configs]
    found = train_seeds(configs, dataset, [tmp_path / c.id for c in configs])
    for one, own in zip(alone, found, strict=True):
        for key in ("train_loss", "test_loss", "test_accuracy"):
            assert own.rows[-1][key] == pytest.approx(one.rows[-1][key], abs=2e-3)
