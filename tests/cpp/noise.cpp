// The arithmetic headers alone, without torch. Reads lines of hexadecimal words, a counter and a
// key: "c0 c1 c2 c3 k0 k1"; writes the four random words, the bits of the four normals and those of
// the signs of the lowest bits.
#include <cinttypes>
#include <cstdio>

#include "../../csrc/normal.h"
#include "../../csrc/philox.h"
#include "../../csrc/scalar.h"

int main() {
  using namespace zo_fused;
  uint32_t c[4], k0, k1;
  while (std::scanf("%" SCNx32 "%" SCNx32 "%" SCNx32 "%" SCNx32 "%" SCNx32 "%" SCNx32, &c[0], &c[1],
                    &c[2], &c[3], &k0, &k1) == 6) {
    philox<Scalar>(c, round_keys(static_cast<uint64_t>(k1) << 32 | k0));
    float z[4];
    normal_pair<Scalar>(c[0], c[1], z[0], z[1]);
    normal_pair<Scalar>(c[2], c[3], z[2], z[3]);
    for (const uint32_t word : c) std::printf("%08" PRIx32 " ", word);
    for (const float x : z) std::printf("%08" PRIx32 " ", bits_of(x));
    for (const uint32_t word : c) std::printf("%08" PRIx32 " ", bits_of(Scalar::ones(word)));
    std::puts("");
  }
}
