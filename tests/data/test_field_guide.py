import collections
import re

import numpy as np
import pytest

from speciarl_jax.data.field_guide import answers, specimens, taxonomy

DOMAINS = ("bird", "flower", "aircraft", "dog")
SHARES = {"generic": 0.6, "genus": 0.25, "species": 0.15}
COMPLETION = re.compile(r"<think>([a-z ,]+)\. ([a-z]+)</think><answer>([a-z ]+)</answer>")


def _all_species():
    return [one for members in taxonomy.load_species().values() for one in members]


def _nodes(node):
    yield node
    for child in node.get("children", []):
        yield from _nodes(child)


def test_taxonomy_has_four_domains_of_two_families_two_genera_six_species():
    domains = taxonomy.load_species()
    assert tuple(domains) == DOMAINS
    for members in domains.values():
        genera = collections.Counter((one.family, one.genus) for one in members)
        assert len(genera) == 4
        assert set(genera.values()) == {6}
        assert len({family for family, _ in genera}) == 2


def test_parts_within_a_genus_tell_every_species_apart_but_no_single_part_does():
    by_genus = collections.defaultdict(list)
    for one in _all_species():
        by_genus[one.genus].append(one)
    for members in by_genus.values():
        assert len({one.parts for one in members}) == len(members)
        colours = collections.Counter(one.parts[0][1] for one in members)
        assert set(colours.values()) == {2}
        assert sum(one.parts[1][1] == "plain" for one in members) == 3


def test_a_modifier_means_the_same_part_everywhere():
    meaning = collections.defaultdict(set)
    for one in _all_species():
        modifier = one.name.split()[0]
        assert one.name == f"{modifier} {one.genus}"
        pattern = one.parts[1][1]
        meaning[modifier].add(one.parts[0][1] if pattern == "plain" else pattern)
    assert len(meaning) == 11
    assert all(len(found) == 1 for found in meaning.values())


def test_names_and_synonyms_are_unique_over_the_whole_tree():
    nodes = list(_nodes(taxonomy.load_tree()))[1:]
    names = [text.lower() for node in nodes for text in (node["name"], *node["synonyms"])]
    doubles = [name for name, times in collections.Counter(names).items() if times > 1]
    assert doubles == []
    assert all(node["synonyms"] for node in nodes)


def test_every_genus_has_a_painter():
    genera = {one.genus for one in _all_species()}
    assert genera == set(specimens.PAINTERS)
    families = {one.family for one in _all_species()}
    assert families == set(specimens.GENUS_PARTS)


@pytest.mark.parametrize("domain", DOMAINS)
def test_rendering_is_deterministic_and_in_range(domain):
    drawn = specimens.draw_specimens(domain, "train", 48, seed=3)
    assert drawn == specimens.draw_specimens(domain, "train", 48, seed=3)
    pictures = [specimens.render(one) for one in drawn]
    for picture in pictures:
        assert picture.mode == "RGB"
        assert all(84 <= side <= 168 for side in picture.size)
        assert np.asarray(picture).std() > 3.0
    assert len({picture.size for picture in pictures}) > 24
    assert specimens.encode_png(drawn[5]) == specimens.encode_png(drawn[5])
    assert specimens.encode_png(drawn[5]).startswith(b"\x89PNG")


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_picture_leaves_open_as_many_species_as_it_says(domain):
    """Of one seed, so many species of the genus come out as the same picture, byte for byte.

    Two genera of one family differ in a few pixels, which distance, leaves and blur hide.
    """
    members = taxonomy.load_species()[domain]
    for number, one in enumerate(specimens.draw_specimens(domain, "test", 20)):
        candidates = (1, 2, 3, 6, 12)[number % 5]
        siblings = [other for other in members if other.genus == one.species.genus]
        pictures = [
            specimens.render(specimens.Specimen(other, candidates, one.seed)).tobytes()
            for other in siblings
        ]
        alike = pictures.count(pictures[siblings.index(one.species)])
        assert alike == min(candidates, 6)


def test_most_hard_pictures_leave_a_genus_or_a_family_open():
    drawn = specimens.draw_specimens("bird", "test", 500)
    counts = collections.Counter(one.candidates for one in drawn)
    assert counts == {1: 300, 2: 10, 3: 10, 6: 150, 12: 30}


def test_specimens_are_balanced_shuffled_and_hard_as_asked():
    drawn = specimens.draw_specimens("dog", "validation", 240, hard_frac=0.25)
    counts = collections.Counter(one.species.name for one in drawn)
    assert len(counts) == 24
    assert set(counts.values()) == {10}
    assert sum(one.is_hard for one in drawn) == 60
    levels = collections.Counter(one.honest_level for one in drawn)
    assert levels == {"species": 180, "genus": 51, "family": 9}
    assert [one.species.name for one in drawn[:24]] != [one.species.name for one in drawn[24:48]]


def test_no_seed_is_shared_between_splits_or_domains():
    seeds = [
        one.seed
        for domain in DOMAINS
        for split in specimens.SPLITS
        for one in specimens.draw_specimens(domain, split, 30)
    ]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("domain", "split", "count", "hard_frac", "match"),
    [
        ("cat", "train", 1, 0.2, "domain='cat'"),
        ("bird", "dev", 1, 0.2, "split='dev'"),
        ("bird", "train", -1, 0.2, "count=-1"),
        ("bird", "train", 1, 1.5, "hard_frac=1.5"),
    ],
)
def test_bad_arguments_are_refused(domain, split, count, hard_frac, match):
    with pytest.raises(ValueError, match=match):
        specimens.draw_specimens(domain, split, count, hard_frac=hard_frac)


def test_answer_by_hand():
    (species,) = [one for one in _all_species() if one.name == "banded heron"]
    assert species.family == "wader"
    clear, rain, moon, dim, far = (
        specimens.Specimen(species, candidates, (0,)) for candidates in (1, 2, 3, 6, 12)
    )
    assert answers.answer_text(clear, "species") == (
        "<think>blue body, striped, long legs, straight bill. exact</think>"
        "<answer>banded heron</answer>"
    )
    assert answers.answer_text(rain, "species") == (
        "<think>blue body, details unclear, long legs, straight bill. exact</think>"
        "<answer>banded heron</answer>"
    )
    assert answers.answer_text(moon, "family") == (
        "<think>colours unclear, details unclear, long legs, straight bill. kind</think>"
        "<answer>wader</answer>"
    )
    assert answers.answer_text(dim, "genus") == (
        "<think>colours unclear, long legs, straight bill. close</think><answer>heron</answer>"
    )
    assert answers.answer_text(far, "domain") == (
        "<think>colours unclear, long legs, details unclear. broad</think><answer>bird</answer>"
    )
    with pytest.raises(ValueError, match="level='order'"):
        answers.answer_text(clear, "order")


def test_answers_parse_and_carry_the_right_name():
    for domain in DOMAINS:
        for one in specimens.draw_specimens(domain, "warmup", 60):
            for level in answers.LEVELS:
                match = COMPLETION.fullmatch(answers.answer_text(one, level))
                parts, word, label = match.groups()
                assert 2 <= len(parts.split(", ")) <= 4
                assert word == answers.LEVEL_WORDS[level]
                assert label == answers.label_at(one, level)


def test_levels_follow_the_shares_and_the_honest_caps():
    drawn = specimens.draw_specimens("bird", "warmup", 6000, hard_frac=0.5)
    rng = np.random.default_rng(0)
    found = collections.defaultdict(collections.Counter)
    for one in drawn:
        found[one.honest_level][answers.sample_level(one, rng, SHARES, honest_frac=0.8)] += 1
    shares = {
        honest: {level: times / counts.total() for level, times in counts.items()}
        for honest, counts in found.items()
    }
    assert shares["species"]["species"] == pytest.approx(0.15, abs=0.03)
    assert shares["species"]["genus"] == pytest.approx(0.25, abs=0.03)
    assert shares["genus"]["species"] == pytest.approx(0.15 * 0.2, abs=0.02)
    assert shares["family"]["genus"] + shares["family"]["species"] == pytest.approx(0.08, abs=0.02)


def test_full_honesty_never_passes_the_honest_level():
    rng = np.random.default_rng(1)
    for one in specimens.draw_specimens("flower", "warmup", 300, hard_frac=1.0):
        level = answers.sample_level(one, rng, {"species": 1.0}, honest_frac=1.0)
        assert level == one.honest_level
    with pytest.raises(ValueError, match="shares="):
        answers.sample_level(one, rng, {"order": 1.0}, honest_frac=1.0)
