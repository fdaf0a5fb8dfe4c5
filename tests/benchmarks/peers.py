"""The other data loaders, each as its documentation sets it up, and each again with the fast decoder.

    .bench/venv/bin/python -m tests.benchmarks.peers convert litdata TARS FOLDER
    .bench/venv/bin/python -m tests.benchmarks.peers run litdata-fast WARM_SOURCE SOURCE IMAGES

Stock: Pillow and torchvision's RandomResizedCrop, flip, ToTensor, Normalize. Fast: the decoder that
vitscale uses (simplejpeg, torch's antialiased resize of uint8), and uint8 batches.
"""

import functools
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.contender import BATCH, SIZE, Measurement, Source, measure, report

SHARD_BYTES = 9 << 20
"""Of the formats of others: about the size of the tars, so that all read pieces of one size."""
SHUFFLE = 256
"""Samples in the shuffle buffers of those that have one."""
WARM_BATCHES = 4

Transform = Callable[[bytes], torch.Tensor]


def webdataset(source: Source, transform: Transform) -> Iterator[torch.Tensor]:
    """Tars over `pipe:curl`, as webdataset's documentation reads object stores that speak HTTP."""
    import webdataset as wds

    urls = [f"pipe:curl -sfL '{_presigned(source, shard)}'" for shard in source.shards]
    return iter(
        wds.WebDataset(urls, shardshuffle=len(urls), seed=0)
        .shuffle(SHUFFLE, initial=SHUFFLE)
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(BATCH, partial=False)
        .map(lambda batch: batch[0])
    )


def mosaicml(source: Source, transform: Transform) -> Iterator[torch.Tensor]:
    import streaming

    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL_S3"]

    class Photos(streaming.StreamingDataset):
        def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(at)
            return transform(sample["jpg"]), sample["cls"]

    data = Photos(remote=source.url, local=source.scratch, shuffle=True, batch_size=BATCH)
    loader = streaming.StreamingDataLoader(data, batch_size=BATCH, num_workers=0, drop_last=True)
    return (images for images, _ in loader)


def litdata(source: Source, transform: Transform) -> Iterator[torch.Tensor]:
    import litdata
    import litdata.streaming.downloader

    # litData 0.2.76 has no setting for this: without it its client refuses an endpoint that is not https.
    litdata.streaming.downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    data = litdata.StreamingDataset(
        source.url,
        cache_dir=source.scratch,
        shuffle=True,
        drop_last=True,
        storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"]},
        transform=lambda sample: (transform(sample["jpg"]), sample["cls"]),
    )
    loader = litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=0, drop_last=True)
    return (images for images, _ in loader)


def energon(source: Source, transform: Transform) -> Iterator[torch.Tensor]:
    """Over NVIDIA's Multi-Storage Client, its way to S3."""
    _write_msc_config(Path(source.scratch, "msc.json"))
    from megatron import energon

    class Photos(energon.TaskEncoder):
        decoder = None

        def encode_sample(self, sample):
            return energon.ImageClassificationSample.derive_from(
                sample, image=transform(sample.image), label=int(sample.label)
            )

    place = urllib.parse.urlsplit(source.url)
    data = energon.get_train_dataset(
        f"msc://bench/{place.netloc}{place.path}",
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        task_encoder=Photos(),
        batch_size=BATCH,
        shuffle_buffer_size=SHUFFLE,
        max_samples_per_sequence=100,
    )
    return (batch.image for batch in energon.get_loader(data))


def spdl(source: Source, transform: Transform | None) -> Iterator[torch.Tensor]:
    """SPDL brings pipelines and decoders and leaves reading to the user: whole tars, by boto3 here."""
    import boto3
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])
    place = urllib.parse.urlsplit(source.url)

    def images_of(shard: str) -> list[bytes]:
        key = f"{place.path.strip('/')}/{shard}"
        tar = client.get_object(Bucket=place.netloc, Key=key)["Body"].read()
        return [bytes(data) for name, data in spdl.io.iter_tarfile(tar) if name.endswith(".jpg")]

    shards = random.Random(0).sample(source.shards, len(source.shards))
    pipeline = (
        PipelineBuilder()
        .add_source(shards)
        .pipe(images_of)
        .disaggregate()
        .pipe(transform or functools.partial(_ffmpeg, random.Random(0)), concurrency=2)
        .aggregate(BATCH, drop_last=True)
        .pipe(torch.stack)
        .add_sink(4)
        .build(num_threads=4)
    )
    with pipeline.auto_stop():
        yield from pipeline


def _ffmpeg(rng: random.Random, jpeg: bytes) -> torch.Tensor:
    """SPDL's own decoder: crop, scale and flip by FFmpeg's filters, then what ToTensor and Normalize do."""
    import spdl.io

    packets = spdl.io.demux_image(jpeg)
    top, left, height, width = _crop(packets.height, packets.width, rng)
    flip = ",hflip" if rng.random() < 0.5 else ""
    wanted = f"crop={width}:{height}:{left}:{top},scale={SIZE}:{SIZE}:flags=bilinear{flip},format=rgb24"
    frames = spdl.io.decode_packets(packets, filter_desc=wanted)
    pixels = spdl.io.to_torch(spdl.io.convert_frames(frames))
    return (pixels.permute(2, 0, 1).float() / 255 - _MEAN) / _STD


def _stock() -> Transform:
    from PIL import Image
    from torchvision import transforms

    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(_MEAN.flatten().tolist(), _STD.flatten().tolist()),
        ]
    )
    return lambda jpeg: augment(Image.open(io.BytesIO(jpeg)).convert("RGB"))


_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def _fast() -> Transform:
    import simplejpeg
    from torch.nn.functional import interpolate

    rng = random.Random(0)

    def transform(jpeg: bytes) -> torch.Tensor:
        height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
        top, left, h, w = _crop(height, width, rng)
        factor = next((f for f in (8, 4, 2) if min(h, w) >= f * SIZE), 1)  # libjpeg scales as it decodes
        pixels = simplejpeg.decode_jpeg(jpeg, "RGB", min_height=-(-height // factor), min_factor=factor)
        box = pixels[top // factor : (top + h) // factor, left // factor : (left + w) // factor]
        image = torch.from_numpy(np.ascontiguousarray(box)).permute(2, 0, 1)[None]
        resized = interpolate(image, (SIZE, SIZE), mode="bilinear", antialias=True)[0]
        return resized.flip(2) if rng.random() < 0.5 else resized

    return transform


def _crop(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Top, left, height, width of torchvision's RandomResizedCrop, without its tensors for each number."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        aspect = (3 / 4) ** rng.uniform(-1, 1)
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _presigned(source: Source, shard: str) -> str:
    import boto3

    place = urllib.parse.urlsplit(source.url)
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])
    wanted = {"Bucket": place.netloc, "Key": f"{place.path.strip('/')}/{shard}"}
    return client.generate_presigned_url("get_object", wanted)


def _write_msc_config(path: Path) -> None:
    keys = {
        "access_key": os.environ["AWS_ACCESS_KEY_ID"],
        "secret_key": os.environ["AWS_SECRET_ACCESS_KEY"],
    }
    where = {
        "endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"],
        "region_name": os.environ["AWS_REGION"],
        "base_path": "",
    }
    bench = {
        "storage_provider": {"type": "s3", "options": where},
        "credentials_provider": {"type": "S3Credentials", "options": keys},
    }
    path.write_text(json.dumps({"profiles": {"bench": bench}}))
    os.environ["MSC_CONFIG"] = str(path)


PEERS = {"webdataset": webdataset, "mosaicml": mosaicml, "litdata": litdata, "energon": energon, "spdl": spdl}
CONTENDERS = [f"{peer}{decoder}" for peer in PEERS for decoder in ("", "-fast")]


def run(contender: str, warm: Source, source: Source, images: int) -> Measurement:
    """Another, small set first, to its end, so that nothing is imported or set up under the clock; then
    from the first request on."""
    torch.set_num_threads(1)
    peer = contender.removesuffix("-fast")
    transform = _fast() if contender != peer else None if peer == "spdl" else _stock()
    for _ in itertools.islice(PEERS[peer](warm, transform), WARM_BATCHES):
        pass
    return measure(PEERS[peer](source, transform), 0, images)


def convert(peer: str, tars: Path, folder: Path) -> None:
    """The set in the format of a peer that cannot read tars."""
    CONVERSIONS[peer](tars, folder)


def _samples(tars: Path) -> Iterator[dict[str, object]]:
    from tests.benchmarks import photos

    for path in sorted(tars.glob("*.tar")):
        for _, jpeg, label in photos.read(path):
            yield {"jpg": jpeg, "cls": label}


def _to_mds(tars: Path, folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"jpg": "bytes", "cls": "int"}, size_limit=SHARD_BYTES) as writer:
        for sample in _samples(tars):
            writer.write(sample)


def _to_litdata(tars: Path, folder: Path) -> None:
    from litdata.streaming import Cache

    cache = Cache(str(folder), chunk_bytes=SHARD_BYTES)
    for at, sample in enumerate(_samples(tars)):
        cache[at] = sample
    cache.done()
    cache.merge()


def _to_energon(tars: Path, folder: Path) -> None:
    """The same tars, with Energon's index beside them."""
    for path in tars.glob("*.tar"):
        shutil.copy(path, folder)
    options = "--non-interactive --split-ratio 1,0,0 --sample-type ImageClassificationSample --num-workers 1"
    fields = ["--field-map", json.dumps({"image": "jpg", "label": "cls"})]
    energon = Path(sys.executable).with_name("energon")
    subprocess.run([energon, "prepare", *options.split(), *fields, folder], check=True)


CONVERSIONS = {"mosaicml": _to_mds, "litdata": _to_litdata, "energon": _to_energon}


def _allow_torchvision() -> torch.library.Library:
    """PyPI's torchvision is built for CUDA; beside CPU torch its own operators cannot be loaded. None of
    them is used here, and their schemas, alive as long as what is returned, are enough to import it."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return library


if __name__ == "__main__":
    schemas = _allow_torchvision()
    match sys.argv[1:]:
        case ["convert", peer, tars, folder]:
            convert(peer, Path(tars), Path(folder))
        case ["run", contender, warm, source, images]:
            report(run(contender, Source(**json.loads(warm)), Source(**json.loads(source)), int(images)))
        case _:
            sys.exit(__doc__)
