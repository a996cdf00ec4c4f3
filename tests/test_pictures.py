"""`read_digit`: a digit is found in pictures of every kind, and what is no picture is said so."""

import io
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from properties import refuses

from nn_backprop.data import DataError, ImageData, load, read_digit
from nn_backprop.models import MLP
from nn_backprop.studies import train_network

REAL_ROOT = os.environ.get("NN_BACKPROP_DATA")
SEVEN = np.zeros((20, 15), dtype=np.uint8)  # light on dark
SEVEN[:3], SEVEN[3:, 9:12] = 255, 255


def on_canvas(ink=SEVEN, width=60, height=50, left=30, top=5) -> Image.Image:
    canvas = Image.new("L", (width, height), 0)
    canvas.paste(Image.fromarray(ink), (left, top))
    return canvas


@pytest.fixture
def read(tmp_path):
    """Saves a picture under a name, reads it back as a digit."""

    def saved(picture: Image.Image, name: str = "digit.png", layout: str = "mnist", **options):
        picture.save(tmp_path / name, **options)
        image = read_digit(tmp_path / name, layout)
        assert image.shape == (1, 28, 28) and image.dtype == torch.uint8
        assert image.max() == 255
        return image[0].int()

    return saved


def test_the_digit_keeps_its_pixels_and_gets_its_place(read):
    image = read(on_canvas())
    rows, columns = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
    top, left = int(rows[0]), int(columns[0])
    assert len(rows) == 20 and len(columns) == 15
    assert np.array_equal(image[top : top + 20, left : left + 15].numpy(), SEVEN)
    # The centre of mass of MNIST's images is pixel 14, counted from 0, in both directions.
    for axis in (0, 1):
        centre = (image.sum(1 - axis) * torch.arange(28)).sum() / image.sum()
        assert abs(centre - 14) <= 0.5


def equal(image, expected) -> bool:
    return bool((image - expected).abs().max() <= 1)


def test_dark_on_light_or_transparent_or_coloured_is_the_same_digit(read):
    expected = read(on_canvas())
    light, dark = on_canvas(), ImageOps.invert(on_canvas())
    blue = Image.merge("RGB", [dark, dark, Image.new("L", dark.size, 255)])  # on white
    black, brown = (Image.new("RGBA", dark.size, strokes) for strokes in ("black", "#802020"))
    for transparent in (black, brown):
        transparent.putalpha(light)
    under = Image.fromarray(np.uint8(np.random.default_rng(0).integers(256, size=(50, 60))))
    under.paste(0, mask=light)  # black strokes; what is transparent has a colour that nobody sees
    noisy, palette = Image.merge("LA", [under, light]), dark.convert("P")
    for picture, name in (
        (dark, "png"), (dark.convert("RGB"), "bmp"), (light.convert("1"), "png"),
        (light.convert("P"), "png"), (palette, "gif"), (dark.convert("CMYK"), "tiff"),
        (blue, "png"), (black, "png"), (brown, "png"), (noisy, "png"),
    ):  # fmt: skip
        assert equal(read(picture, f"digit.{name}"), expected), (picture, name)
    assert equal(read(palette, transparency=palette.getpixel((0, 0))), expected)


def test_the_background_is_what_most_of_the_border_shows(read):
    """Also where the digit, or a shadow, reaches the border."""
    for left, top in ((0, 0), (0, 30), (45, 0), (45, 30)):
        touching = on_canvas(left=left, top=top)
        assert equal(read(touching), read(on_canvas()))
        assert equal(read(ImageOps.invert(touching)), read(on_canvas()))


def test_sixteen_bits(read):
    expected = read(on_canvas())
    for low, high in ((0, 65535), (1000, 40000), (0, 255), (7, 200)):
        deep = low + (high - low) * (np.array(on_canvas()) / 255)
        assert equal(read(Image.fromarray(np.uint16(deep))), expected), (low, high)
        assert equal(read(Image.fromarray(np.int32(deep)), "digit.tiff"), expected), (low, high)
        assert equal(read(Image.fromarray(np.float32(deep)), "digit.tiff"), expected), (low, high)


def test_a_photograph_is_turned_as_its_exif_data_say(read):
    expected, turns = read(on_canvas()), Image.Transpose
    for orientation, turn in ((3, turns.ROTATE_180), (6, turns.ROTATE_90), (8, turns.ROTATE_270)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = on_canvas().transpose(turn)
        assert equal(read(turned, exif=exif), expected)
        large = turned.resize([8 * side for side in turned.size], Image.Resampling.NEAREST)
        photograph = read(large, "digit.jpg", exif=exif)
        assert (photograph - expected).abs().double().mean() < 2
        assert not equal(read(turned), expected)
    photograph = ImageOps.invert(on_canvas()).resize((600, 500), Image.Resampling.NEAREST)
    for quality in (20, 75):  # the noise of compression does not count
        found = read(photograph.convert("RGB"), "digit.jpg", quality=quality)
        assert (found - expected).abs().double().mean() < 2


def test_the_first_frame_of_an_animation_counts(read):
    expected, more = read(on_canvas()), [Image.new("L", (60, 50), 0)]
    for name in ("digit.gif", "digit.png"):
        assert equal(read(on_canvas(), name, save_all=True, append_images=more), expected)


def white(*size) -> Image.Image:
    return on_canvas(np.full(size, 255, np.uint8))


def test_the_longer_side_is_scaled_to_that_of_the_layout_from_any_size(read):
    wide = read(on_canvas(SEVEN.T.copy(), 99, 99))
    assert int(wide.any(0).sum()) == 20 and int(wide.any(1).sum()) == 15
    corner = Image.new("L", (2, 2), 0)
    corner.putpixel((0, 0), 255)
    for layout, side in (("mnist", 20), ("digits", 28)):
        for scale in (0.4, 2, 7, 25):
            size = round(60 * scale), round(50 * scale)
            image = read(on_canvas().resize(size, Image.Resampling.NEAREST), layout=layout)
            assert int(image.any(1).sum()) == side, (layout, scale)
            assert abs(int(image.any(0).sum()) - side * 15 / 20) <= 1.5, (layout, scale)
        one = read(white(30, 1), layout=layout)
        assert int(one.any(0).sum()) == 1 and int(one.any(1).sum()) == side
        for picture in (white(1, 1), white(1, 30), corner):
            read(picture, layout=layout)
        long = on_canvas(np.full((3000, 2), 255, np.uint8), 9, 3010, 3, 5)
        assert read(long, layout=layout).max() == 255
    hairline = Image.fromarray(255 - 255 * np.eye(1500, dtype=np.uint8)[:, ::-1])
    # as dark as a stroke: averaged over the pixels it would all but vanish
    assert (read(hairline) > 100).sum() >= 20


def test_what_shows_no_digit_or_is_no_picture_is_said_so(read, tmp_path, monkeypatch):
    for picture in (
        *(Image.new("L", (30, 20), colour) for colour in (0, 128, 255)),
        Image.fromarray(np.full((20, 30), 40_000, np.uint16)),
        Image.new("RGBA", (30, 20), (9, 9, 9, 0)),
        Image.fromarray(np.random.default_rng(0).integers(250, 256, (30, 20), np.uint8)),
    ):
        sentence = "blank.png shows no digit: it is of one colour; give"
        refuses(sentence, read, picture, "blank.png", error=DataError)
    (tmp_path / "text.png").write_text("seven")
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "empty.png", "none.png", ".", "text.png/below.png"):
        sentence = refuses("", read_digit, tmp_path / name, error=DataError)
        assert sentence.startswith(f"{tmp_path / name} cannot be read as a picture (")
        assert sentence.endswith("): give a PNG or JPEG") and "\n" not in sentence
    for limit in (2000, 1000):  # of memory; at the first, Pillow only warns
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refuses("exceeds limit", read, on_canvas(), error=DataError)


def test_a_damaged_file_gives_a_sentence_or_a_digit(tmp_path):
    numbers, path = random.Random(7), tmp_path / "digit"
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        whole = io.BytesIO()
        on_canvas().save(whole, kind)
        refused = 0
        for trial in range(60):
            content = bytearray(whole.getvalue())
            if trial % 2:
                del content[numbers.randrange(len(content)) :]
            else:
                for _ in range(4):
                    content[numbers.randrange(min(60, len(content)))] = numbers.randrange(256)
            path.write_bytes(content)
            try:
                assert read_digit(path).shape == (1, 28, 28), kind
            except DataError:
                refused += 1
        assert refused > 6, kind


def trained(data: ImageData, epochs: int) -> MLP:
    torch.manual_seed(0)
    model = MLP()
    train_network(model, data, lr=4e-3, epochs=epochs, batch_size=128, seed=0, decay=0.1)
    return model.eval()


def agreement(data: ImageData, epochs: int, read) -> float:
    """The share of test images that are taken for the same digit from a larger picture of them."""
    model, numbers = trained(data, epochs), random.Random(1)
    found = []
    for image in data.images[data.test[:200], 0].numpy():
        side = numbers.randrange(28, 90)
        place = {"left": numbers.randint(0, side - 28), "top": numbers.randint(0, side - 28)}
        canvas = on_canvas(image, side, side, **place)
        canvas = ImageOps.invert(canvas) if numbers.random() < 0.5 else canvas
        canvas = canvas.resize((3 * side, 3 * side)) if numbers.random() < 0.5 else canvas
        found.append(read(canvas, layout=data.name)[None])
    originals, _ = data.batch(data.test[:200])
    with torch.no_grad():
        guesses = [model(x).argmax(1) for x in (data.normalise(torch.stack(found)), originals)]
    return (guesses[0] == guesses[1]).double().mean().item()


def test_a_digit_is_recognised_in_a_larger_picture(read):
    """The place of these digits in their image is coarse, 3.5 pixels, and is lost."""
    assert agreement(load("digits"), 15, read) > 0.93


@pytest.mark.slow
@pytest.mark.needs_mnist
def test_an_mnist_digit_is_recognised_in_a_larger_picture(read):
    assert agreement(load("mnist", REAL_ROOT, say=lambda line: None), 1, read) > 0.98
