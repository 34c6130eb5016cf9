// The one table of tiles of the Hopper attention kernels: how many queries and keys a CTA takes at
// a time, for each head_dim and mask. Apart from the launchers, so that tuning is a change of this
// file; `vlmkernels info --verbose` prints it.
#pragma once

namespace vlmkernels {

inline constexpr int kHopperTileDims[] = {64, 80, 96, 112, 128};
inline constexpr int kHopperMaskedTileDims[] = {64, 80, 96, 128, 192, 256};
inline constexpr int kHopperMaskedBwdTileDims[] = {64, 80, 96, 128};
inline constexpr int kHopperDbiasTileDims[] = {64, 96, 128, 256};
inline constexpr int kHopperWideBwdTileDims[] = {192, 256};  // whatever the mask is

// What decides between the tiles of a head_dim. kShort: no sequence has more than 64 queries;
// kMasked: whatever the mask is, float32 results, several heads in a tile.
enum class FwdCase { kFull, kCausal, kShort, kMasked };

struct AttentionFwdChoice {
    int tile_dim;  // columns: a head_dim takes the next one, missing columns are zero-filled
    FwdCase which;
    int consumers;   // warpgroups of 64 queries each
    int keys;        // of a block
    int stages;      // blocks of keys, and as many of values, in flight
    int q_stages;    // blocks of queries in flight
    int ctas;        // on an SM
    bool ping_pong;  // the products of one warpgroup run during the softmax of another
};

// Chosen by ptxemu's timing model, see docs/measured/attention.md; not yet on a GPU.
inline constexpr AttentionFwdChoice kAttentionFwdTable[] = {
    {64, FwdCase::kFull, 3, 128, 2, 2, 1, true},    {64, FwdCase::kCausal, 3, 128, 2, 2, 1, true},
    {64, FwdCase::kShort, 1, 64, 2, 2, 3, false},   {80, FwdCase::kFull, 3, 112, 2, 2, 1, true},
    {80, FwdCase::kCausal, 3, 112, 2, 2, 1, true},  {80, FwdCase::kShort, 1, 64, 2, 2, 2, false},
    {96, FwdCase::kFull, 3, 96, 2, 2, 1, true},     {96, FwdCase::kCausal, 3, 96, 2, 2, 1, true},
    {96, FwdCase::kShort, 1, 64, 2, 2, 2, false},   {112, FwdCase::kFull, 2, 128, 2, 2, 1, true},
    {112, FwdCase::kCausal, 2, 128, 2, 2, 1, true}, {112, FwdCase::kShort, 1, 64, 2, 2, 2, false},
    {128, FwdCase::kFull, 2, 176, 2, 1, 1, true},   {128, FwdCase::kCausal, 2, 128, 2, 2, 1, true},
    {128, FwdCase::kShort, 1, 64, 2, 2, 2, false},  {64, FwdCase::kMasked, 2, 128, 2, 2, 1, true},
    {80, FwdCase::kMasked, 2, 128, 2, 2, 1, true},  {96, FwdCase::kMasked, 2, 128, 2, 2, 1, true},
    {128, FwdCase::kMasked, 2, 128, 2, 2, 1, true}, {192, FwdCase::kMasked, 2, 112, 2, 1, 1, true},
    {256, FwdCase::kMasked, 2, 80, 2, 1, 1, true},
};

// The backward has two kernels: one holds queries and gives dq, one holds keys and gives dk and dv.
enum class BwdSide { kQueries, kKeys };

struct AttentionBwdChoice {
    int tile_dim;
    BwdSide side;
    bool masked;    // for all masks and float32 results, or full and causal only
    int consumers;  // warpgroups, 64 resident rows each; beyond 128 columns two share 64 keys
    int rows;       // of a streamed block
    int stages;     // streamed blocks in flight
    bool overlap;   // of a warpgroup's own products with its elementwise work
    int held;       // k-steps of the resident rows in registers, of 2 tile_dim / 16
};

inline constexpr AttentionBwdChoice kAttentionBwdTable[] = {
    {64, BwdSide::kQueries, false, 2, 96, 4, true, 8},
    {64, BwdSide::kKeys, false, 2, 64, 4, true, 8},
    {80, BwdSide::kQueries, false, 2, 64, 4, true, 10},
    {80, BwdSide::kKeys, false, 2, 48, 4, true, 10},
    {96, BwdSide::kQueries, false, 2, 64, 4, true, 12},
    {96, BwdSide::kKeys, false, 2, 48, 4, true, 9},
    {112, BwdSide::kQueries, false, 2, 64, 4, true, 14},
    {112, BwdSide::kKeys, false, 2, 48, 4, true, 5},
    {128, BwdSide::kQueries, false, 2, 64, 4, true, 14},
    {128, BwdSide::kKeys, false, 2, 48, 4, true, 1},
    {64, BwdSide::kQueries, true, 2, 96, 4, true, 0},
    {64, BwdSide::kKeys, true, 2, 48, 5, true, 8},
    {80, BwdSide::kQueries, true, 2, 64, 4, true, 10},
    {80, BwdSide::kKeys, true, 2, 64, 4, true, 0},
    {96, BwdSide::kQueries, true, 2, 64, 4, true, 12},
    {96, BwdSide::kKeys, true, 2, 48, 4, true, 3},
    {128, BwdSide::kQueries, true, 2, 64, 4, true, 8},
    {128, BwdSide::kKeys, true, 2, 48, 3, false, 0},
    {192, BwdSide::kQueries, true, 2, 80, 2, false, 0},
    {192, BwdSide::kKeys, true, 1, 80, 2, false, 0},
    {256, BwdSide::kQueries, true, 2, 48, 2, false, 0},
    {256, BwdSide::kKeys, true, 1, 48, 3, false, 0},
};

// dbias has a kernel of its own, whatever the mask is.
struct AttentionDbiasChoice {
    int tile_dim;
    int consumers;  // warpgroups of 64 queries each
    int keys;       // of a tile of dbias
    int stages;     // items in flight: q and k of a head, or dout and v
};

inline constexpr AttentionDbiasChoice kAttentionDbiasTable[] = {
    {64, 2, 96, 6},
    {96, 2, 96, 4},
    {128, 2, 96, 3},
    {256, 2, 48, 2},
};

constexpr AttentionBwdChoice bwd_choice(int tile_dim, BwdSide side, bool masked) {
    for (const AttentionBwdChoice& choice : kAttentionBwdTable)
        if (choice.tile_dim == tile_dim && choice.side == side && choice.masked == masked)
            return choice;
    return {};
}

constexpr AttentionDbiasChoice dbias_choice(int tile_dim) {
    for (const AttentionDbiasChoice& choice : kAttentionDbiasTable)
        if (choice.tile_dim == tile_dim) return choice;
    return {};
}

// The row of the table; tile_dim must have one.
constexpr AttentionFwdChoice fwd_choice(int tile_dim, FwdCase which) {
    for (const AttentionFwdChoice& choice : kAttentionFwdTable)
        if (choice.tile_dim == tile_dim && choice.which == which) return choice;
    return {};
}

// Columns of the first of some tiles that holds head_dim; 0 where there is none.
template <const auto& kTileDims>
constexpr int hopper_tile_dim(int head_dim) {
    if (head_dim > 32)
        for (int tile_dim : kTileDims)
            if (head_dim <= tile_dim) return tile_dim;
    return 0;
}

}  // namespace vlmkernels
