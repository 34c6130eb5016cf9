// New keys and values go into a KV cache, keys and queries rotated on the way: a row at a time.
#include "attention/attention_cpu.h"
#include "attention/cache_append.h"

namespace vlmkernels {
namespace {

template <class T, class Table>
class Append {
  public:
    explicit Append(const CacheAppendParams& p) : p_(p) {}

    void token(int64_t batch, int64_t token) const {
        const int64_t length = p_.cache_seqlens[batch], position = length + token;
        if (token < p_.seqlen_q)
            for (int64_t head = 0; head < p_.num_heads; ++head)
                rotate(at(p_.q, batch, token, head), at(p_.q_out, batch, token, head),
                       p_.rotary_dim, p_.one_position ? length : position);
        if (token >= p_.seqlen_new) return;
        int64_t row = batch, place = position;
        if (p_.block_table) {
            row = p_.block_table[batch * p_.block_table_stride + position / p_.page_size];
            place = position % p_.page_size;
        }
        for (int64_t head = 0; head < p_.num_heads_k; ++head) {
            rotate(at(p_.k, batch, token, head), at(p_.k_cache, row, place, head), p_.rotary_dim,
                   position);
            rotate(at(p_.v, batch, token, head), at(p_.v_cache, row, place, head), 0, position);
        }
    }

  private:
    T* at(const HeadsView& view, int64_t row, int64_t token, int64_t head) const {
        return static_cast<T*>(view.data) + row * view.batch_stride + token * view.token_stride +
               head * view.head_stride;
    }

    void rotate(const T* from, T* to, int64_t rotary_dim, int64_t position) const {
        const Table* cos = static_cast<const Table*>(p_.cos) + position * p_.cos_stride;
        const Table* sin = static_cast<const Table*>(p_.sin) + position * p_.sin_stride;
        const int64_t half = rotary_dim / 2, step = p_.interleaved ? 1 : half;
        for (int64_t i = 0; i < half; ++i) {
            const int64_t first = p_.interleaved ? 2 * i : i;
            const float a = to_float(from[first]), b = to_float(from[first + step]);
            const float c = to_float(cos[i]), s = to_float(sin[i]);
            to[first] = from_float<T>(a * c - b * s);
            to[first + step] = from_float<T>(a * s + b * c);
        }
        std::memcpy(to + rotary_dim, from + rotary_dim, (p_.head_dim - rotary_dim) * sizeof(T));
    }

    const CacheAppendParams& p_;
};

}  // namespace

template <class Isa>
void cache_append_cpu(const CacheAppendParams& p) {
    const int64_t tokens = std::max(p.seqlen_q, p.seqlen_new);
    dispatch_float(p.dtype, [&]<class T>() {
        dispatch_float(p.table_dtype, [&]<class Table>() {
            const Append<T, Table> append(p);
            parallel_for(p.batch * tokens, 16, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) append.token(i / tokens, i % tokens);
            });
        });
    });
}

template void cache_append_cpu<VLMKERNELS_ISA>(const CacheAppendParams& p);

}  // namespace vlmkernels
