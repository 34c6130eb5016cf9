// What each of instances/*.cu provides.
#pragma once

#include "attention/attention.h"

namespace vlmkernels {

inline constexpr int kDecodeRows = 16;  // of query heads times queries that one CTA takes

struct PlainScores;   // of mask.cuh: for kAttentionTileDims
struct MaskedScores;  // for kMaskedTileDims

template <class Element, int kTileDim, class Scores>
Error attention_fwd(const AttentionParams& p, Stream stream);
template <class Element, int kTileDim, class Scores>
Error attention_bwd(const AttentionBackwardParams& p, Stream stream);
template <class Element, int kTileDim>  // for kMaskedTileDims
Error attention_dbias(const AttentionBackwardParams& p, Stream stream);
template <class Element, int kTileDim>  // for kHopperTileDims
Error attention_fwd_sm90(const AttentionParams& p, Stream stream);
template <class Element, int kTileDim>  // for kHopperMaskedTileDims; of heads heads in a tile
Error attention_fwd_masked_sm90(AttentionParams p, int heads, Stream stream);
template <class Element, int kTileDim, class Scores>  // masked: for kHopperMaskedBwdTileDims
Error attention_bwd_sm90(const AttentionBackwardParams& p, Stream stream);
template <class Element, int kTileDim>  // for kHopperDbiasTileDims
Error attention_dbias_sm90(const AttentionBackwardParams& p, Stream stream);
template <class Element, int kTileDim>  // for kHopperWideBwdTileDims
Error attention_bwd_wide_sm90(const AttentionBackwardParams& p, Stream stream);
// Writes tile_order: tiles of so many rows of q or of k.
Error attention_tile_order(const AttentionParams& p, int rows, bool of_keys, Stream stream);
template <class Element, int kTileDim>  // for kAttentionTileDims
Error attention_decode(const AttentionDecodeParams& p, Stream stream);

}  // namespace vlmkernels
