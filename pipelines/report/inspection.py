"""The page of `vitscale inspect`: each figure with a sentence on how to read it, and the numbers below."""

from base64 import b64encode
from collections.abc import Mapping
from html import escape

from pipelines.report.markup import details_table, document, figure, table
from workers.probes import Probes

FIGURES = {
    "filters": (
        "Patch filters",
        "Principal components of the filters that turn a patch into a token, largest first; zero is "
        "mid-grey. Smooth bumps and waves are a basis for what patches look like; what looks like noise was "
        "not learned.",
    ),
    "positions": (
        "Where patches are",
        "Each tile belongs to one patch, at its place, and shows how similar its position embedding is to "
        "all others. A bright spot that moves with the tile says that the model knows where its patches are; "
        "bright rows and columns, that it knows them as rows and columns.",
    ),
    "distance": (
        "How far heads look",
        "Each point is a head: the mean distance between a patch and what it attends to. Low heads look "
        "nearby, as convolutions do; heads at the dashed line look everywhere alike. After much training the "
        "first blocks have both kinds and the last look far.",
    ),
    "history": (
        "From local to global",
        "The mean distance of each block at every checkpoint. A model that has learned nothing looks "
        "everywhere alike, at the dashed line; blocks leave it as their heads find what to look at.",
    ),
    "rollout": (
        "What the output is made of",
        "Beside each image, the same lit by how much of each patch reaches the output when attention is "
        "followed through all blocks, half of each step being the residual connection.",
    ),
    "growth": (
        "Is it stable",
        "Entropy near zero means that heads look at a single token each and pass hardly any gradient; it "
        "comes with logits that grow from checkpoint to checkpoint. Then lower the learning rate, or set "
        "model.qk_norm.",
    ),
}
MISSING = {
    "filters": "Its patches are the features of a ResNet: no filter shows what they look for.",
    "positions": "Its positions are rotary: no patch has an embedding.",
}
WIDE = ("rollout", "growth")
"""Over the page's whole width."""
BLOCK_HEADER = ("block", "distance (px)", "entropy (nats)", "of log N", "largest logit", "residual norm")
STYLE = """
.drawn { display: block; width: 100%; height: auto; background: #fff; border-radius: 6px; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.pair figure { margin-top: .6rem; }
"""


def render(name: str, facts: Mapping[str, str], probes: Probes, pictures: Mapping[str, bytes]) -> str:
    """HTML that needs no network, no script and no other file. `pictures`: PNG by the names of FIGURES."""
    drawn = {key: _picture(key, pictures[key]) for key in FIGURES if key in pictures}
    pairs = "".join(f"<div>{html}</div>" for key, html in drawn.items() if key not in WIDE)
    wide = "".join(html for key, html in drawn.items() if key in WIDE)
    missing = "".join(f"<p>{text}</p>" for key, text in MISSING.items() if key not in pictures)
    body = (
        f'<header><p class="kicker">vitscale inspect</p><h1>What {escape(name)} learned</h1>'
        f"</header>\n{table(['What', 'Which'], list(facts.items()), text_columns=2)}\n"
        f'<section><div class="pair">{pairs}</div>{missing}{wide}{_numbers(probes)}</section>'
    )
    return document(f"{name}: what it learned", body, style=STYLE)


def block_rows(probes: Probes) -> list[list[str]]:
    """Of each block: number, distance, entropy, its share of log N, largest logit, residual norm."""
    return [
        [
            str(block + 1),
            f"{probes.attention_distance[block].mean():.1f}",
            f"{probes.attention_entropy[block].mean():.2f}",
            f"{probes.relative_entropy[block].mean():.0%}",
            f"{probes.attention_logit_max[block].max():.1f}",
            f"{probes.residual_norm[block]:.1f}",
        ]
        for block in range(len(probes.residual_norm))
    ]


def _picture(key: str, png: bytes) -> str:
    title, caption = FIGURES[key]
    data = b64encode(png).decode()
    image = f'<img class="drawn" src="data:image/png;base64,{data}" alt="{escape(title)}">'
    return f"<h3>{escape(title)}</h3>{figure(image, escape(caption))}"


def _numbers(probes: Probes) -> str:
    return details_table("Numbers by block, means over heads", BLOCK_HEADER, block_rows(probes))
