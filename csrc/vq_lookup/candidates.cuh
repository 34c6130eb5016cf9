// The codes of each token that rounding cannot rule out, in a short list in shared memory. A warp
// owns its tokens: nobody else touches their lists.
#pragma once

#include "vq_lookup/prepare.cuh"

namespace vlmkernels {

struct VqCandidate {
    float upper;  // the true score is at most this
    int code;
};

// Scores come as accumulators of m16n8 products: a thread holds 2 kM tokens (m * 16 + half * 8 +
// lane / 4) and, of each 8 codes, the two from lane % 4 * 2. Four lanes, a quad, share a token.
template <int kM, int kSlots>
class VqCandidates {
  public:
    static constexpr int kTokens = 16 * kM, kN = VqPrepared::kTileCodes / 8;
    static constexpr int kParts = 4;          // of a tile, to find a score sooner
    static constexpr int kMost = kSlots;      // a higher count: some did not fit
    static constexpr int kInvalid = 1 << 30;  // the count of a token that isn't valid
    static_assert(kSlots % 4 == 0);
    struct Shared {  // of one warp
        VqCandidate list[kTokens][kSlots];
        int count[kTokens];    // above kSlots: some did not fit
        float scale[kTokens];  // what the token is multiplied by
        float norm[kTokens];   // its length, scaled
    };

    __device__ VqCandidates(Shared& shared, int lane) : shared_(shared), lane_(lane) {
#pragma unroll
        for (int i = 0; i < 2 * kM; ++i) {
            scale_[i] = shared.scale[token(i)];
            norm_[i] = shared.norm[token(i)];
            lower_[i] = -0x1.fffffep127f;
        }
    }

    // Takes a tile of products with the codes from first_code on.
    __device__ void add(float (&scores)[kM][kN][4], const VqTile& tile, const float* half_norms,
                        int first_code) {
        float part_best[2 * kM][kParts];
        to_scores(scores, part_best, tile, half_norms);
#pragma unroll
        for (int i = 0; i < 2 * kM; ++i) {
            float best = part_best[i][0];
#pragma unroll
            for (int part = 1; part < kParts; ++part) best = fmaxf(best, part_best[i][part]);
            const float unit = scale_[i] * tile.scale;
            const float bound =
                fmaf(tile.per_norm, norm_[i], fmaf(tile.per_scale, scale_[i], tile.constant));
            if (!__any_sync(0xffffffffu, best > fmaf(lower_[i], unit, -bound))) continue;
            const float inverse_unit = inverse_power_of_two(unit);
            const float of_quad = quad_max(best);
            lower_[i] = fmaxf(lower_[i], (of_quad - bound) * inverse_unit);
            drop(i, kSlots / 2);
            const float limit = fmaf(lower_[i], unit, -bound);
#pragma unroll
            for (int part = 0; part < kParts; ++part)
                if (part_best[i][part] > limit)
                    push(i, above(scores, i, part, limit), (best + bound) * inverse_unit,
                         first_code + part * kN / kParts * 8 + lane_ % 4 * 2);
            __syncwarp();
        }
    }

    // After the last tile: leaves those that nothing rules out.
    __device__ void finish() {
#pragma unroll
        for (int i = 0; i < 2 * kM; ++i) drop(i, 0);
        __syncwarp();
    }

  private:
    __device__ int token(int i) const { return i / 2 * 16 + i % 2 * 8 + lane_ / 4; }

    // Products to scores, and the largest of this thread's for each token and part.
    __device__ void to_scores(float (&scores)[kM][kN][4], float (&best)[2 * kM][kParts],
                              const VqTile& tile, const float* half_norms) const {
        float factor[2 * kM];
#pragma unroll
        for (int i = 0; i < 2 * kM; ++i) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) best[i][part] = -INFINITY;
            factor[i] = -scale_[i] * tile.inverse_scale;
        }
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            const float2 half_norm =
                *reinterpret_cast<const float2*>(half_norms + n * 8 + lane_ % 4 * 2);
#pragma unroll
            for (int i = 0; i < 2 * kM; ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float& score = scores[i / 2][n][i % 2 * 2 + j];
                    score = fmaf(factor[i], j ? half_norm.y : half_norm.x, score);
                    float& part_best = best[i][n * kParts / kN];
                    part_best = fmaxf(part_best, score);
                }
        }
    }

    __device__ static float inverse_power_of_two(float x) {
        return __uint_as_float((254u << 23) - __float_as_uint(x));
    }

    __device__ static float quad_max(float x) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
        return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
    }

    // Which of this thread's scores of a token, in one part of the tile, are above the limit.
    __device__ static uint32_t above(const float (&scores)[kM][kN][4], int i, int part,
                                     float limit) {
        uint32_t mask = 0;
#pragma unroll
        for (int bit = 0; bit < 2 * kN / kParts; ++bit)
            if (scores[i / 2][part * kN / kParts + bit / 2][i % 2 * 2 + bit % 2] > limit)
                mask |= 1u << bit;
        return mask;
    }

    // upper: of this thread's best score, and so of all of them.
    __device__ void push(int i, uint32_t mask, float upper, int code) {
        for (; mask; mask &= mask - 1) {
            const int bit = __ffs(mask) - 1;
            const int slot = atomicAdd(&shared_.count[token(i)], 1);
            if (slot < kSlots) shared_.list[token(i)][slot] = {upper, code + bit / 2 * 8 + bit % 2};
        }
    }

    // Drops those that are out by now, from lists longer than `most`.
    __device__ void drop(int i, int most) {
        constexpr int kEach = kSlots / 4;
        const int count = shared_.count[token(i)], lane = lane_ % 4;
        const bool wanted = count > most && count <= kSlots;
        if (!__any_sync(0xffffffffu, wanted)) return;
        VqCandidate kept[kEach];
        int num_kept = 0;
#pragma unroll
        for (int s = 0; s < kEach; ++s) {
            const int slot = lane * kEach + s;
            kept[s].code = -1;
            if (wanted && slot < count) kept[s] = shared_.list[token(i)][slot];
            if (!(kept[s].upper >= lower_[i])) kept[s].code = -1;
            num_kept += kept[s].code >= 0;
        }
        int before = num_kept;  // of this lane and those before it
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) {
            const int x = __shfl_up_sync(0xffffffffu, before, offset, 4);
            if (lane >= offset) before += x;
        }
        __syncwarp();
        if (wanted && lane == 3) shared_.count[token(i)] = before;
        before -= num_kept;
#pragma unroll
        for (int s = 0; s < kEach; ++s)
            if (kept[s].code >= 0) shared_.list[token(i)][before++] = kept[s];
        __syncwarp();
    }

    Shared& shared_;
    const int lane_;
    float scale_[2 * kM], norm_[2 * kM], lower_[2 * kM];
};

}  // namespace vlmkernels
