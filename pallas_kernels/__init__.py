"""Operations on arrays, one folder each; they know no codec, cache or model.

`entropy_decode`, attention over entropy-coded rows, comes with the codecs that write them.
"""
