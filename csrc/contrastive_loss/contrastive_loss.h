// contrastive_loss: InfoNCE (CLIP) and the pairwise sigmoid loss (SigLIP) of the logits
// s_ij = logit_scale image_i . text_j [+ logit_bias], never in memory as a whole.
//   contrastive_loss.h         what the kernels are given, and the launch declarations
//   contrastive_fwd.cuh        one sweep over tiles of s: log-sum-exps of rows and of columns
//   contrastive_bwd.cuh        ds of a panel of rows, then ds text and ds^T image from it
//   contrastive_hopper.cuh     the same with TMA and wgmma
//   launch.cuh, launch_hopper.cuh   tiles, panels and launches; instances/*.cu one element type
//   each contrastive_loss.cu        launchers contrastive_loss_cpu.cpp   the same statistics of
//   products that PyTorch multiplied contrastive_loss.cpp       argument checks and binding
// Pair (i, i) is positive, all others are negative; in a block off the diagonal of a batch that is
// spread over processes all are negative.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"
#include "common/launch.h"

namespace vlmkernels {

// A log-sum-exp is kept in two parts, [2, n]: the largest logit, and the logarithm of the sum of
// exp(s - largest). Their sum, rounded, would cost a large logit's digits.

// Tiles of s are square; a warp reduces a quarter of one.
inline int contrastive_tile(int64_t panel_rows, int64_t num_texts) {
    return panel_rows * num_texts >= 100 * 128 * 128 ? 128 : 64;
}
inline constexpr int kMaxSms = 160;  // that persistent kernels use
inline int64_t tiles_of(int64_t n, int tile) { return (n + tile - 1) / tile; }

struct ContrastivePairs {
    const void* image;         // [num_images, dim]
    const void* text;          // [num_texts, dim]
    const float* logit_scale;  // one value
    const float* logit_bias;   // one value; null: 0
    int num_images, num_texts, dim;
    int panel_rows;  // rows of s of which partial results, or ds, are in memory at a time
    bool positives;  // false: a block off the diagonal
    DType dtype;     // of image and text: fp16 or bf16
};

struct ContrastiveForwardParams {
    ContrastivePairs pairs;
    float* image_lse;  // [2, num_images], CLIP; null: SigLIP
    float* text_lse;   // [2, num_texts], CLIP
    float* positive;   // [num_images], CLIP: s_ii; untouched where there are no positives
    float* losses;     // [num_images], SigLIP: sum_j of softplus(-z_ij s_ij)
    float* workspace;  // contrastive_workspace floats
};

struct ContrastiveBackwardParams {
    ContrastivePairs pairs;
    const float* image_lse;           // [2, num_images], CLIP; null: SigLIP
    const float* text_lse;            // [2, num_texts], CLIP
    float image_weight, text_weight;  // CLIP: of the loss by rows and of that by columns
    const float* factor;              // one value: of all gradients
    float* dimage;                    // [num_images, dim]; null: not wanted
    float* dtext;                     // [num_texts, dim]; null: not wanted
    float* sums;                      // [2, num_sums], zeros: of ds * image . text, and of ds
    void* panel;                      // [panel_rows, panel_stride], of dtype
    int num_sums;
    int64_t panel_stride;
};

Error launch_contrastive_forward(const ContrastiveForwardParams& p, Stream stream);
Error launch_contrastive_backward(const ContrastiveBackwardParams& p, Stream stream);

// Products [num_rows, num_texts] = image rows * text^T, multiplied by someone else.
struct ContrastiveProducts {
    const void* products;
    const float* logit_scale;
    const float* logit_bias;
    int64_t num_rows, num_texts;
    int64_t first_positive;  // column of the positive of row 0; of row i that + i
    DType dtype;
};

struct ClipRowsParams {
    ContrastiveProducts x;
    float* image_max;  // [num_rows]
    float* image_log;  // [num_rows]: log of the sum of exp(s - image_max)
    float* positive;   // [num_rows] or null
    float* text_max;   // [num_texts], of the rows so far
    float* text_sum;   // [num_texts], of exp(s - text_max)
    float* workspace;  // [2, num_strips(num_texts), num_rows]
};

struct SiglipRowsParams {
    ContrastiveProducts x;
    float* losses;  // [num_rows]
};

struct ContrastiveGradientRowsParams {
    ContrastiveProducts x;
    void* ds;  // [num_rows, num_texts], of x.dtype, times the factor; may be x.products
    const float* factor;     // one value
    const float* image_lse;  // [2, num_rows], CLIP; null: SigLIP
    const float* text_lse;   // [2, num_texts], CLIP
    float image_weight, text_weight;
    float* sums;  // [2, num_rows]: of ds * product, and of ds
};

inline constexpr int64_t kStrip = 256;  // columns that a thread takes at a time
inline int64_t num_strips(int64_t num_texts) { return (num_texts + kStrip - 1) / kStrip; }

// Floats of a panel's partial results: of each row and column of a tile two, a maximum and a sum
// each.
inline int64_t contrastive_workspace(int64_t panel_rows, int64_t num_texts) {
    const int tile = contrastive_tile(panel_rows, num_texts);
    return 4 * (tiles_of(num_texts, tile) * panel_rows + tiles_of(panel_rows, tile) * num_texts);
}
inline int64_t contrastive_num_sums(int64_t panel_rows, int64_t num_texts) {
    const int tile = contrastive_tile(panel_rows, num_texts);
    return std::max<int64_t>(8 * kMaxSms,  // warps of persistent CTAs, or tiles
                             tiles_of(panel_rows, tile) * tiles_of(num_texts, tile));
}

template <class Isa>
void clip_rows_cpu(const ClipRowsParams& p);
template <class Isa>
void siglip_rows_cpu(const SiglipRowsParams& p);
template <class Isa>
void contrastive_gradient_rows_cpu(const ContrastiveGradientRowsParams& p);

}  // namespace vlmkernels
