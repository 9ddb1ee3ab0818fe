import pytest
import torch

import fluxlab as fl
from fluxlab.course.drawn import Drawn, swapped


@pytest.fixture(scope="module")
def drawn():
    return Drawn(fl.load("flux-tiny-dev"), number=4)


def test_words_stand_in_their_captions_and_their_things_where_they_were_drawn(drawn):
    assert len(drawn.scenes) == len(drawn.pictures) == len(drawn.clean) == 4
    for word in drawn.words:
        first, second = drawn.scenes[word.picture].things
        thing, rival = (first, second) if word.text == getattr(first, word.kind) else (second, first)
        assert word.text == getattr(thing, word.kind) != getattr(rival, word.kind)
        assert drawn.scenes[word.picture].caption().split()[word.column] == word.text
        mine = drawn.pictures[word.picture].masks[0 if thing is first else 1].reshape(8, 16, 8, 16).mean((1, 3))
        assert word.own.reshape(8, 8)[divmod(int(mine.argmax()), 8)]
        assert word.own.any()
        assert word.other.any()
        assert not (word.own & word.other).any()


def test_at_mixes_clean_pictures_with_noise(drawn):
    assert torch.equal(drawn.at(0.0).img, drawn.clean)
    noise = fl.pack(fl.noise(range(4), 128, 128))
    torch.testing.assert_close(drawn.at(1.0).img, noise)
    torch.testing.assert_close(drawn.at(0.3).img, 0.7 * drawn.clean + 0.3 * noise)
    assert drawn.at(0.3).timesteps.tolist() == pytest.approx([0.3] * 4)


@pytest.mark.parametrize("what", ["thing", "background"])
def test_swapped_changes_one_word(drawn, what):
    for scene in drawn.scenes:
        words, others = scene.caption().split(), swapped(scene, what).caption().split()
        changed = [i for i, (a, b) in enumerate(zip(words, others, strict=True)) if a != b]
        assert changed == [words.index(scene.background if what == "background" else scene.things[0].colour)]
