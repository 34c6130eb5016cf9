// Reads patches of a PixelView to registers.
#pragma once

#include "patch_embed/pixels.cuh"

namespace vlmkernels {

// Walks along the columns of one patch in runs that lie together.
template <int kElements, class View>
class PixelWalk {
  public:
    __device__ PixelWalk(const View& x, const PixelRow& row, int column)
        : x_(x), row_(row), at_(x.column(column)) {
        find_line();
    }
    // The place of the next run.
    __device__ const typename View::T* next() {
        const auto* run = x_.data + (line_ + at_.w);
        at_.w += kElements;
        if (at_.w == x_.step_w) {
            at_.w = 0;
            if (++at_.h == x_.step_h) {
                at_.h = 0;
                if (++at_.t == x_.frames) at_.t = 0, ++at_.channel;
            }
            find_line();
        }
        return run;
    }

  private:
    __device__ void find_line() { line_ = row_ + PixelColumn{at_.channel, at_.t, at_.h, 0}; }
    const View& x_;
    const PixelRow& row_;
    PixelColumn at_;
    int64_t line_;
};

// What a thread reads at once of a patch: kGroups groups of 16 bytes, zeros beyond the last column.
// Bytes are read as signed ones, less 128. Here eight
// lines of 14 bytes from even addresses, as the four words that hold each. Nothing branches and no
// address waits for another, so that all is under way before the first is needed. A patch has eight
// lines or more.
template <class View>
struct Lines14 {
    static constexpr int kGroups = 7;

    __device__ static void read(uint32_t (&words)[kGroups * 4], const View& x, const PixelRow& row,
                                bool valid, int column) {
        const int num_lines = max(0, x.num_columns - column) / 14, most = max(0, num_lines - 1);
        column = min(column, x.num_columns - 14);
        const PixelColumn at = x.column(column);
        const int wrap = x.step_h - at.h;
        // Of the lines in this plane of the patch, and of those in the next less `wrap` lines.
        const uint8_t* planes[2] = {
            x.data + (row + at),
            x.data + (row + x.column(column + wrap * 14)) - wrap * row.stride_h};
        uint32_t lines[8][4];
        int skip[8];  // bits before the line
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int line = min(i, most);
            const auto from = reinterpret_cast<uintptr_t>((line < wrap ? planes[0] : planes[1]) +
                                                          int64_t(line) * row.stride_h);
            skip[i] = from % 4 * 8;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                lines[i][j] = reinterpret_cast<const uint32_t*>(from & ~uintptr_t(3))[j];
        }
#pragma unroll
        for (int i = 0; i < 8; i += 2) {  // 28 bytes are 7 words
            const auto &a = lines[i], &b = lines[i + 1];
            uint32_t* to = words + i / 2 * 7;
#pragma unroll
            for (int j = 0; j < 3; ++j) {
                to[j] = __funnelshift_r(a[j], a[j + 1], skip[i]);
                to[j + 4] = __funnelshift_rc(b[j], b[j + 1], skip[i + 1] + 16);
            }
            to[3] = __byte_perm(a[3] >> skip[i], b[0] >> skip[i + 1], 0x5410);
        }
#pragma unroll
        for (uint32_t& word : words) word ^= 0x80808080;
        if (valid && num_lines >= 8) return;
        const int end = valid ? num_lines * 14 : 0;
#pragma unroll
        for (int i = 0; i < kGroups * 4; ++i)
            words[i] = i * 4 >= end ? 0 : i * 4 + 2 >= end ? words[i] & 0xffff : words[i];
    }
};

// Or whatever lies together, kBytes at a time.
template <class View, int kBytes>
struct Runs {
    static constexpr int kGroups = kBytes < 4 ? kBytes : 4;
    static constexpr int kElements = kBytes / int(sizeof(typename View::T));
    using Run =
        std::conditional_t<kBytes == 8, uint64_t,
                           std::conditional_t<kBytes == 4, uint32_t,
                                              std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>;

    __device__ static void read(uint32_t (&words)[kGroups * 4], const View& x, const PixelRow& row,
                                bool valid, int column) {
        constexpr Run kSigns = sizeof(typename View::T) == 1 ? Run(0x8080808080808080) : 0;
        PixelWalk<kElements, View> walk(x, row, column);
#pragma unroll
        for (int i = 0; i < kGroups * 16 / kBytes; ++i) {
            const auto* from = walk.next();
            const bool there = valid && column + i * kElements < x.num_columns;
            Run run = *reinterpret_cast<const Run*>(there ? from : x.data);
            run = there ? run ^ kSigns : 0;
            if constexpr (kBytes == 8) {
                words[i * 2] = uint32_t(run), words[i * 2 + 1] = uint32_t(run >> 32);
            } else {
                const int word = i * kBytes / 4, shift = i * kBytes % 4 * 8;
                words[word] = (shift ? words[word] : 0) | uint32_t(run) << shift;
            }
        }
    }
};

// Calls f.template operator()<Reader>().
template <class View, class F>
__device__ void with_reader(const View& x, F&& f) {
    constexpr int kSize = sizeof(typename View::T);
    if constexpr (kSize == 1)
        if (x.step_w == 14 && x.step_h >= 8 && x.run_bytes >= 4)
            return f.template operator()<Lines14<View>>();
    switch (x.run_bytes * kSize / 2) {  // in bytes of the source
        case 16:
        case 8: return f.template operator()<Runs<View, 8>>();
        case 4: return f.template operator()<Runs<View, 4>>();
        case 2: return f.template operator()<Runs<View, 2>>();
        default: return f.template operator()<Runs<View, kSize>>();
    }
}

}  // namespace vlmkernels
