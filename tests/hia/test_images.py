"""Radiographs in: PIL, NumPy, files, DICOM; windows; errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import hia
from hia.images.load import Radiograph

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("image", "dtype", "channels", "window"),
    [
        pytest.param(np.full((20, 30), 7, np.uint8), torch.uint8, 1, (0, 255), id="uint8"),
        pytest.param(np.arange(600, dtype=np.uint16).reshape(20, 30), torch.uint16, 1, (0, 599), id="uint16"),
        pytest.param(np.full((20, 30, 1), 5, np.uint16), torch.uint16, 1, (5, 6), id="flat-uint16"),
        pytest.param(RNG.random((20, 30, 3)), torch.float32, 3, (0, 1), id="float64"),
        pytest.param(RNG.random((20, 30)).astype(np.float16) * 0 + 50, torch.float32, 1, (50, 51), id="float16"),
        pytest.param(np.arange(600, dtype=">u2").reshape(20, 30), torch.uint16, 1, (0, 599), id="big-endian"),
        pytest.param(Image.new("L", (30, 20)), torch.uint8, 1, (0, 255), id="L"),
        pytest.param(Image.new("RGB", (30, 20)), torch.uint8, 3, (0, 255), id="RGB"),
        pytest.param(Image.new("RGBA", (30, 20)), torch.uint8, 3, (0, 255), id="RGBA"),
        pytest.param(Image.new("LA", (30, 20)), torch.uint8, 1, (0, 255), id="LA"),
        pytest.param(Image.new("1", (30, 20)), torch.uint8, 1, (0, 255), id="1"),
        pytest.param(Image.new("P", (30, 20)), torch.uint8, 3, (0, 255), id="P"),
        pytest.param(Image.new("I;16", (30, 20), 9), torch.uint16, 1, (9, 10), id="I;16"),
        pytest.param(Image.new("I", (30, 20), 9), torch.uint16, 1, (9, 10), id="I"),
        pytest.param(Image.new("F", (30, 20)), torch.float32, 1, (0, 1), id="F"),
        pytest.param(torch.zeros(20, 30, dtype=torch.uint8), torch.uint8, 1, (0, 255), id="tensor"),
    ],
)
def test_kinds_of_images(image, dtype, channels, window):
    radiograph = hia.load_image(image)
    assert radiograph.pixels.dtype == dtype
    assert radiograph.pixels.shape == (20, 30, channels)
    assert radiograph.window == window


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        pytest.param(
            np.zeros((0, 5), np.uint8), ValueError, r"image must have shape .* without a zero, got \[0, 5\]", id="zero"
        ),
        pytest.param(
            Image.new("L", (0, 5)), ValueError, "image must not be zero-sized, got 0 x 5 pixels", id="zero-pil"
        ),
        pytest.param(np.full((5, 5), np.nan), ValueError, "image must be finite, got NaN or infinite", id="nan"),
        pytest.param(np.full((5, 5), np.inf), ValueError, "image must be finite", id="inf"),
        pytest.param(
            np.full((5, 5), -0.5), ValueError, "image must not be negative, got a pixel of -0.5", id="negative"
        ),
        pytest.param(
            np.zeros((5, 5), np.int16), TypeError, "image must be uint8, uint16 or float, got int16", id="int16"
        ),
        pytest.param(np.zeros((5, 5), bool), TypeError, "image must be uint8, uint16 or float, got bool", id="bool"),
        pytest.param(
            np.zeros((3, 5, 6), np.uint8), ValueError, r"got \[3, 5, 6\]; move the channels last", id="channels-first"
        ),
        pytest.param(
            np.zeros((5, 6, 4), np.uint8),
            ValueError,
            r"must have shape \[H, W, 1\] or \[H, W, 3\], got \[5, 6, 4\]",
            id="four",
        ),
        pytest.param(np.zeros(5, np.uint8), ValueError, r"must have shape \[H, W\] or \[H, W, C\]", id="vector"),
        pytest.param(Image.new("I", (5, 5), -3), ValueError, "must hold 16-bit values, got -3", id="int32"),
        pytest.param([1, 2], TypeError, "must be a PIL image, a NumPy array, a tensor or a path, got list", id="list"),
        pytest.param("nowhere.png", FileNotFoundError, "image must be an image file, got nowhere.png", id="no-file"),
    ],
)
def test_bad_images(image, kind, message):
    with pytest.raises(kind, match=message):
        hia.load_image(image)


def test_bad_window():
    with pytest.raises(ValueError, match=r"image's window must hold two different finite values, got \(3, 3\)"):
        hia.load_image(np.zeros((5, 5), np.uint8), window=(3, 3))


def test_sixteen_bit_png_keeps_its_bits(tmp_path):
    array = RNG.integers(0, 65536, (40, 30), dtype=np.uint16)
    Image.fromarray(array).save(tmp_path / "radiograph.png")
    loaded = hia.load_image(tmp_path / "radiograph.png")
    assert torch.equal(loaded.pixels[..., 0].int(), torch.from_numpy(array.astype(np.int32)))


def test_inverted_window_is_a_negative():
    pixels = torch.tensor([[[0], [250], [1000]]], dtype=torch.uint16)
    shown = Radiograph(pixels, (0.0, 1000.0)).windowed()
    inverted = Radiograph(pixels, (1000.0, 0.0)).windowed()
    torch.testing.assert_close(inverted, 1 - shown)
    assert np.asarray(Radiograph(pixels, (1000.0, 0.0)).to_pil())[0, 1].tolist() == [191, 191, 191]


def test_resizing_keeps_dtype_and_window():
    small = hia.load_image(np.full((64, 48), 700, np.uint16), window=(0, 1023)).resized(28, 28)
    assert small.pixels.shape == (28, 28, 1)
    assert small.pixels.dtype == torch.uint16
    assert (small.pixels.int() == 700).all()
    assert small.window == (0, 1023)


def write_dicom(path, array, **fields):
    """Write a minimal uncompressed file."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Rows, dataset.Columns = array.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.PixelData = array.tobytes()
    for name, value in fields.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


STORED = np.arange(4096, dtype=np.uint16).reshape(64, 64)


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        pytest.param({}, (0, 4095), id="no-window"),
        # C.11.2.1.2.1: centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
        pytest.param({"WindowCenter": 2048, "WindowWidth": 1001}, (1547.5, 2547.5), id="linear"),
        pytest.param({"WindowCenter": [2048, 1], "WindowWidth": [1001, 2]}, (1547.5, 2547.5), id="first-of-several"),
        pytest.param(
            {"WindowCenter": 2048, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"}, (1548, 2548), id="exact"
        ),
        pytest.param({"PhotometricInterpretation": "MONOCHROME1"}, (4095, 0), id="monochrome1"),
        pytest.param({"RescaleSlope": 2, "RescaleIntercept": -1000}, (0, 8190), id="modality-lut"),
    ],
)
def test_dicom_windows(tmp_path, fields, window):
    radiograph = hia.load_image(write_dicom(tmp_path / "image.dcm", STORED, **fields))
    assert radiograph.window == window
    assert radiograph.pixels.dtype == torch.uint16
    slope = int(fields.get("RescaleSlope", 1))
    assert torch.equal(radiograph.pixels[..., 0].int(), torch.from_numpy(STORED.astype(np.int32)) * slope)


def test_dicom_with_fractional_values(tmp_path):
    radiograph = hia.load_image(write_dicom(tmp_path / "image.dcm", STORED, RescaleSlope=0.5, RescaleIntercept=0))
    assert radiograph.pixels.dtype == torch.float32
    assert radiograph.window == (0, 2047.5)


def test_dicom_without_one_frame(tmp_path):
    with pytest.raises(ValueError, match="must hold one frame, got 2; pass the frame's array instead"):
        hia.load_image(write_dicom(tmp_path / "two.dcm", np.stack([STORED, STORED]), NumberOfFrames=2))


def test_real_dicom(data_dir):
    pytest.importorskip("openjpeg")
    loaded = {path.stem: hia.load_image(path) for path in sorted((data_dir / "dicom").glob("*.dcm"))}
    assert {name: tuple(r.pixels.shape) for name, r in loaded.items()} == {
        "RG1_J2KI": (1955, 1841, 1),
        "RG3_J2KR": (1760, 1760, 1),
        "RG3_deflated": (1760, 1760, 1),
    }
    assert all(r.pixels.dtype == torch.uint16 and r.window[0] > r.window[1] for r in loaded.values())  # MONOCHROME1
    assert torch.equal(loaded["RG3_J2KR"].pixels, loaded["RG3_deflated"].pixels)


def test_real_radiographs(radiographs):
    for path in radiographs:
        radiograph = hia.load_image(path)
        with Image.open(path) as image:
            assert radiograph.pixels.shape == (image.height, image.width, len(image.getbands()))
            assert np.array_equal(np.asarray(radiograph.to_pil()), np.asarray(image.convert("RGB")))
