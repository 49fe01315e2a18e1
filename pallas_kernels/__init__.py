"""Operations on arrays, one folder each; they know no codec, cache or model."""
