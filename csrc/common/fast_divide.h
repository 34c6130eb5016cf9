// Division of indices below 2^31 by a number > 0 known at launch: a multiplication and a shift.
#pragma once

#include <cstdint>

namespace vlmkernels {

class FastDivide {
  public:
    FastDivide() = default;
    explicit FastDivide(uint32_t divisor) : divisor_(divisor) {
        while ((uint64_t(1) << shift_) < divisor) ++shift_;
        multiplier_ =
            uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift_) - divisor)) / divisor + 1);
    }
#ifdef __CUDACC__
    // Returns n / divisor and sets n to n % divisor.
    __device__ uint32_t operator()(uint32_t& n) const {
        const uint32_t quotient = (__umulhi(n, multiplier_) + n) >> shift_;
        n -= quotient * divisor_;
        return quotient;
    }
#endif

  private:
    uint32_t divisor_ = 1, multiplier_ = 1, shift_ = 0;
};

}  // namespace vlmkernels
