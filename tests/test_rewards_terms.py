"""The built-in terms beyond rule and ranking: hand-worked values and what they refuse."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from rewards.collaborative import Collaborative, Output, opinions
from rewards.diversity import Diversity
from rewards.embeddings import cached, fingerprint_of_model
from rewards.errors import RewardError
from rewards.group import Groups, titles_fingerprint
from rewards.interface import Reward, score
from rewards.popularity import Popularity, inverse_propensity
from rewards.samples import CANDIDATES, EXAMPLES, TITLES, SampleCatalog, SampleExamples, sample_groups
from rewards.sasrec import SASRec, SASRecShape, load_sasrec, save_sasrec
from rewards.semantic import Semantic
from rewards.train_sasrec import SASRecTraining, train_sasrec


def score_samples(reward: Reward) -> list[list[float]]:
    return score("tested", reward, sample_groups()).to_pylist()


def write_embeddings(file: Path, vectors: np.ndarray, titles: tuple[str, ...] = TITLES) -> str:
    pq.write_table(pa.table({"title": titles, "embedding": pa.array(list(vectors), pa.list_(pa.float64()))}), file)
    return str(file)


def test_popularity_weighs_a_hit_by_the_inverse_propensity() -> None:
    weight = inverse_propensity(np.array([3, 0, 8]), power=0.5, most=10)
    assert weight / weight[2] == pytest.approx([3 / 2, 3, 1])
    assert np.average(weight, weights=[3, 0, 8]) == pytest.approx(1.0)
    capped = inverse_propensity(np.array([3, 0, 8]), power=0.5, most=2)
    assert capped / capped[2] == pytest.approx([3 / 2, 2, 1])
    for values, candidates, (_, _, target) in zip(
        score_samples(Popularity(SampleCatalog())), CANDIDATES, EXAMPLES, strict=True
    ):
        assert values == pytest.approx([float(item_class == target) for item_class in candidates])


def test_popularity_counts_the_targets_of_the_train_split() -> None:
    class Chosen(SampleExamples):
        target_class = np.zeros(3, np.int32)

    class Catalog(SampleCatalog):
        def examples(self, split: str) -> SampleExamples:
            return Chosen()

    values = score_samples(Popularity(Catalog()))
    assert values[0][0] == pytest.approx(1.0)  # class 0, chosen three times
    assert values[1][3] == pytest.approx(2.0)  # class 5, never
    assert inverse_propensity(np.zeros(2, np.int64), power=0.5, most=10).tolist() == [1, 1]


def test_popularity_refuses_bad_arguments() -> None:
    with pytest.raises(RewardError, match="power=-1 must be 0 or more"):
        Popularity(SampleCatalog(), power=-1)
    with pytest.raises(RewardError, match=r"most=0\.5 1 or more"):
        Popularity(SampleCatalog(), most=0.5)
    assert set(Popularity(SampleCatalog(), power=0, most=1).weight) == {1.0}


def test_diversity_punishes_what_was_already_offered() -> None:
    first, *_, last = score_samples(Diversity(SampleCatalog()))
    assert first[0] == 1.0
    assert first[1] == pytest.approx(1 - 7 / 9)  # "steel hex bolt {3|4} inch pack of 10": 7 of 9 words are shared
    assert first[3] == 1.0
    assert last[1] == 0.0  # no title
    assert last[5] < 0.5 < last[4] == 1.0


def test_a_title_without_words_that_was_already_offered_gets_nothing() -> None:
    class Stars(SampleCatalog):
        def title(self, item_class: int) -> str:
            return "*" * (1 + item_class)

    assert diversity_of((0, 1, 0, -1, -1, 1), Stars()) == [1, 1, 0, 0, 0, 0]


def diversity_of(candidates: tuple[int, ...], catalog: SampleCatalog) -> list[float]:
    table = sample_groups().table.slice(0, 1)
    classes = pa.array([candidates], pa.list_(pa.int32()))
    table = table.set_column(table.column_names.index("candidate_class"), "candidate_class", classes)
    return score("tested", Diversity(catalog), Groups(table, catalog, "train")).to_pylist()[0]


def brute_force_diversity(candidates: tuple[int, ...]) -> list[float]:
    words = [set() if c < 0 else set(TITLES[c].lower().replace(",", "").replace(".", " ").split()) for c in candidates]
    similar = [
        max((len(w & o) / len(w | o) for o in words[:rank] if o), default=0.0) if w else 1.0
        for rank, w in enumerate(words)
    ]
    return [1 - value for value in similar]


def test_diversity_equals_brute_force() -> None:
    class Shouts(SampleCatalog):
        def title(self, item_class: int) -> str:
            return TITLES[item_class].upper() if item_class % 2 else TITLES[item_class]

    for candidates in (*CANDIDATES, (-1, 9, 8, 5, 6, 7)):
        assert diversity_of(candidates, Shouts()) == pytest.approx(brute_force_diversity(candidates))


def test_semantic_is_the_cosine_of_given_embeddings(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(len(TITLES), 5))
    order = np.random.default_rng(1).permutation(len(TITLES))
    file = write_embeddings(tmp_path / "e.parquet", vectors[order], tuple(TITLES[c] for c in order))
    for values, candidates, (_, _, target) in zip(
        score_samples(Semantic(SampleCatalog(), embeddings=file)), CANDIDATES, EXAMPLES, strict=True
    ):
        for value, c in zip(values, candidates, strict=True):
            cosine = vectors[c] @ vectors[target] / np.linalg.norm(vectors[c]) / np.linalg.norm(vectors[target])
            assert value == pytest.approx(-1.0 if c < 0 else cosine, abs=1e-6)


def test_semantic_refuses_bad_embeddings(tmp_path: Path) -> None:
    ones = np.ones((len(TITLES), 3))
    with pytest.raises(RewardError, match=r"needs either args\.model or args\.embeddings"):
        Semantic(SampleCatalog())
    with pytest.raises(RewardError, match=r"needs either args\.model or args\.embeddings"):
        Semantic(SampleCatalog(), model=str(tmp_path), embeddings=write_embeddings(tmp_path / "e.parquet", ones))
    with pytest.raises(RewardError, match=r"no_such.parquet has no readable columns"):
        Semantic(SampleCatalog(), embeddings=str(tmp_path / "no_such.parquet"))
    missing = write_embeddings(tmp_path / "missing.parquet", ones[1:], TITLES[1:])
    with pytest.raises(RewardError, match=r"lacks 1 of 10 titles, the first is 'Steel Hex Bolt, 3 inch"):
        Semantic(SampleCatalog(), embeddings=missing)
    for value in (0, np.inf):
        ones[4] = value
        with pytest.raises(RewardError, match=f"item class 4 has length {value}"):
            Semantic(SampleCatalog(), embeddings=write_embeddings(tmp_path / "e.parquet", ones))


@pytest.mark.parametrize("lists", [[[1.0]] * 9 + [[1.0, 2.0]], [[]] * 10, [None] * 10])
def test_embeddings_of_no_length_or_of_several_are_refused(tmp_path: Path, lists: list) -> None:
    column = pa.array(lists, pa.list_(pa.float32()))
    pq.write_table(pa.table({"title": TITLES, "embedding": column}), tmp_path / "e.parquet")
    with pytest.raises(RewardError, match=r"the embeddings in .*e\.parquet have the lengths \["):
        Semantic(SampleCatalog(), embeddings=str(tmp_path / "e.parquet"))


@pytest.mark.parametrize(
    "column", [pa.array(["0.1, 0.2"] * 10), pa.array([0.1] * 10), pa.array([["a"]] * 10), pa.nulls(10)]
)
def test_embeddings_that_are_no_lists_of_numbers_are_named(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"title": TITLES, "embedding": column}), tmp_path / "e.parquet")
    with pytest.raises(RewardError, match=r"column embedding of .*e\.parquet is .*; it must hold a list of numbers"):
        Semantic(SampleCatalog(), embeddings=str(tmp_path / "e.parquet"))


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 2), pa.large_list(pa.float16()), pa.list_(pa.int8())])
def test_embeddings_may_be_lists_of_any_kind(tmp_path: Path, kind: pa.DataType) -> None:
    vectors = pa.array([np.array([1, c], np.float16) for c in range(10)], pa.large_list(pa.float16())).to_pylist()
    pq.write_table(pa.table({"title": TITLES, "embedding": pa.array(vectors, kind)}), tmp_path / "e.parquet")
    found = Semantic(SampleCatalog(), embeddings=str(tmp_path / "e.parquet")).vectors
    np.testing.assert_allclose(found[:, 1] / found[:, 0], np.arange(10), rtol=1e-6)


def test_semantic_with_a_sentence_transformer(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    pytest.importorskip("sentence_transformers")
    model = write_sentence_model(tmp_path / "model", tiny_tokenizer_dir)
    reward = Semantic(SampleCatalog(), model=str(model), cache=str(tmp_path / "cache"))
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name == f"{titles_fingerprint(TITLES)}-{fingerprint_of_model(str(model))}.npy"
    for values, candidates, (_, _, target) in zip(score_samples(reward), CANDIDATES, EXAMPLES, strict=True):
        if target in candidates:
            assert values[candidates.index(target)] == pytest.approx(1.0, abs=1e-5)
            assert values[candidates.index(target)] == max(values)
    written = file.stat().st_mtime_ns
    Semantic(SampleCatalog(), model=str(model), cache=str(tmp_path / "cache"))
    assert file.stat().st_mtime_ns == written


def write_sentence_model(path: Path, tokenizer_dir: Path) -> Path:
    """A random BERT with mean pooling, in the form of sentence-transformers."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(path / "bert")
    tokenizer.save_pretrained(path / "bert")
    words = models.Transformer(str(path / "bert"))
    SentenceTransformer(modules=[words, models.Pooling(32)], device="cpu").save(str(path / "whole"))
    return path / "whole"


def test_the_fingerprint_of_a_model_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1")
    before = fingerprint_of_model(str(tmp_path))
    assert fingerprint_of_model(str(tmp_path)) == before
    (tmp_path / "weights").write_bytes(b"2")
    assert fingerprint_of_model(str(tmp_path)) != before != fingerprint_of_model("a/name")


@pytest.mark.parametrize("content", [b"junk", b""])
def test_a_damaged_cache_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "e.npy").write_bytes(content)
    with pytest.raises(RewardError, match=r"e.npy is damaged .* delete it"):
        cached(tmp_path / "e.npy", lambda: np.ones(1))


def test_opinions() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert opinions(logits, "scores") is logits
    assert opinions(logits, "ranks")[0].tolist() == pytest.approx([0.5, 1.0, 1 / math.log2(3)])
    total = sum(math.exp(value) for value in (0, 1, 2))
    assert opinions(logits, "probabilities")[0].tolist() == pytest.approx(
        [1 / total, math.e**2 / total, math.e / total]
    )


def test_sasrec_ignores_padding_and_sees_the_order() -> None:
    torch.manual_seed(0)
    small, large = (SASRec(SASRecShape(num_classes=6, max_history=length)).eval() for length in (3, 8))
    state = small.state_dict()
    state["position.weight"] = torch.cat([large.position.weight.data[:5], small.position.weight.data])
    large.load_state_dict(state)
    histories = [[1, 2, 3], [3], [], [2, 1, 3]]
    short, long = small(small.pad(histories)), large(large.pad(histories))
    torch.testing.assert_close(short, long)
    assert short.isfinite().all()
    assert not torch.allclose(short[0], short[3])


class Cycle(SampleExamples):
    """The item after c is always c + 1."""

    target_class = np.arange(200, dtype=np.int32) % len(TITLES)

    def __len__(self) -> int:
        return len(self.target_class)

    def history_classes(self, i: int) -> list[int]:
        return [int(self.target_class[i - 2]), int(self.target_class[i - 1])]


class CycleCatalog(SampleCatalog):
    def examples(self, split: str) -> Cycle:
        return Cycle()


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"patience": -1}, {"batch": 0}, {"lr": -1.0}, {"lr": math.nan}, {"dropout": 2.0}]
)
def test_sasrec_names_what_cannot_be_trained_with(wrong: dict[str, float]) -> None:
    with pytest.raises(RewardError, match="{}={}".format(*next(iter(wrong.items())))):
        SASRecShape(num_classes=2, **wrong) if "dropout" in wrong else SASRecTraining(**wrong)  # type: ignore[arg-type]


def test_sasrec_that_diverges_is_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "sasrec.safetensors"
    with pytest.raises(RewardError, match="the loss is nan after epoch"):
        train_sasrec(CycleCatalog(), file, SASRecTraining(batch=100, lr=1e30), hidden=16, max_history=4)
    with pytest.raises(RewardError, match=r"a score of this SASRec model is not finite.*--lr"):  # after a last step
        train_sasrec(CycleCatalog(), file, SASRecTraining(epochs=1, lr=1e20), hidden=16, max_history=4)
    assert not file.exists()


@pytest.mark.parametrize("output", ["scores", "ranks", "probabilities"])
@pytest.mark.parametrize(("weight", "message"), [(math.nan, "norm.weight of this"), (1e38, "a score of this")])
def test_a_sasrec_that_has_diverged_is_no_reward(tmp_path: Path, output: Output, weight: float, message: str) -> None:
    model = SASRec(SASRecShape(num_classes=len(TITLES)))
    model.norm.weight.data.fill_(weight)
    model.item.weight.data *= 1e20
    save_sasrec(model, tmp_path / "sasrec.safetensors", TITLES, {})
    with pytest.raises(RewardError, match=message):
        score_samples(Collaborative(SampleCatalog(), model=str(tmp_path / "sasrec.safetensors"), output=output))


def test_sasrec_learns_a_cycle_stops_early_and_is_read_back(tmp_path: Path) -> None:
    told: list[str] = []
    training = SASRecTraining(epochs=20, patience=2, batch=32, lr=2e-2)
    file = tmp_path / "models" / "sasrec.safetensors"
    metrics = train_sasrec(CycleCatalog(), file, training, told.append, hidden=16, max_history=4)
    assert metrics["test/hr@1"] == metrics["valid/ndcg@10"] == 1.0
    assert len(told) < 20
    model = load_sasrec(file, TITLES)
    assert model(model.pad([[3, 4], [8, 9]])).argmax(1).tolist() == [5, 0]

    values = score_samples(Collaborative(CycleCatalog(), model=str(file), output="probabilities"))
    logits = score_samples(Collaborative(CycleCatalog(), model=str(file)))
    assert np.array_equal(np.argsort(values[0]), np.argsort(logits[0]))
    assert values[3][1] == 0.0  # no title
    assert logits[3][1] == pytest.approx(model(model.pad([list(EXAMPLES[3][1])])).min().item())


def test_a_sasrec_of_another_catalogue_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sasrec.safetensors"
    save_sasrec(SASRec(SASRecShape(num_classes=2)), file, ["a", "b"], {})
    with pytest.raises(RewardError, match="was trained on 2 other titles than the 10 of this catalogue"):
        Collaborative(SampleCatalog(), model=str(file))
    file.write_bytes(b"junk")
    with pytest.raises(RewardError, match="holds no SASRec model"):
        Collaborative(SampleCatalog(), model=str(file))
    with pytest.raises(RewardError, match="output 'rank' is none of scores, ranks, probabilities"):
        Collaborative(SampleCatalog(), model=str(file), output="rank")


@pytest.mark.parametrize(
    "metadata",
    [
        {"shape": "no JSON", "titles": ""},
        {"shape": "[1]", "titles": ""},
        {"shape": '{"num_classes": 2, "colour": "red"}', "titles": ""},
        {"shape": '{"num_classes": "two"}', "titles": ""},
        {"shape": '{"num_classes": 2}'},
        {},
    ],
)
def test_a_file_that_describes_no_sasrec_is_named(tmp_path: Path, metadata: dict[str, str]) -> None:
    file = tmp_path / "sasrec.safetensors"
    save_file(SASRec(SASRecShape(num_classes=2)).state_dict(), file, metadata)
    with pytest.raises(RewardError, match=r"sasrec.safetensors holds no SASRec model .*; train one: make sasrec"):
        load_sasrec(file, ["a", "b"])
