"""How a block of K or V rows is stored: one codec a file."""

from kvcomp_jax.codecs.across_heads import AcrossHeads
from kvcomp_jax.codecs.affine import Affine
from kvcomp_jax.codecs.base import Codec, Encoded
from kvcomp_jax.codecs.bounded import Bounded
from kvcomp_jax.codecs.channel_scaled import ChannelScaled
from kvcomp_jax.codecs.codebook import Codebook
from kvcomp_jax.codecs.entropy import Entropy
from kvcomp_jax.codecs.float4 import Float4
from kvcomp_jax.codecs.float8 import Float8
from kvcomp_jax.codecs.homomorphic import Homomorphic
from kvcomp_jax.codecs.identity import Identity
from kvcomp_jax.codecs.integer import IntegerCodec
from kvcomp_jax.codecs.low_rank import LowRank
from kvcomp_jax.codecs.outliers import Outliers
from kvcomp_jax.codecs.packs import Packs
from kvcomp_jax.codecs.per_channel import PerChannel
from kvcomp_jax.codecs.pre_rope import PreRope
from kvcomp_jax.codecs.rotated import Rotated
from kvcomp_jax.codecs.sketched import Sketched
from kvcomp_jax.codecs.stepped import Stepped
from kvcomp_jax.codecs.tensor_train import TensorTrain
from kvcomp_jax.codecs.wrapper import Wrapper

__all__ = [
    "AcrossHeads",
    "Affine",
    "Bounded",
    "ChannelScaled",
    "Codebook",
    "Codec",
    "Encoded",
    "Entropy",
    "Float4",
    "Float8",
    "Homomorphic",
    "Identity",
    "IntegerCodec",
    "LowRank",
    "Outliers",
    "Packs",
    "PerChannel",
    "PreRope",
    "Rotated",
    "Sketched",
    "Stepped",
    "TensorTrain",
    "Wrapper",
]
