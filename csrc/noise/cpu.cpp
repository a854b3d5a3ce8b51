#include "../common/cpu_noise.h"
#include "arguments.h"

namespace diffpp::noise::DIFFPP_ISA {
namespace {

void normals_of_chunks(const Normals& a, int64_t begin, int64_t end) {
  alignas(64) float scratch[kChunk];
  const Chunks chunks(a.layout);
  for (int64_t item = begin; item < end; ++item) {
    const auto [b, first, n, offset] = chunks[item];
    float* drawn = destination(a.to, a.dtype, offset, scratch);
    normal_run(first, n, a.noise, static_cast<uint64_t>(a.noise.samples[b]), drawn);
    if (a.dtype == Dtype::float64) {
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(a.to)[offset + i] = static_cast<double>(drawn[i]);
    } else {
      store(drawn, a.to, a.dtype, offset, n);
    }
  }
}

void single_of_samples(const Single& a, int64_t begin, int64_t end) {
  Lanes lanes;
  for (int64_t b = begin; b < end; ++b) {
    philox(0, 1, a.noise.stream, static_cast<uint64_t>(a.noise.samples[b]), a.noise.seed, lanes);
    const uint32_t word = lanes.words[0][0];
    if (a.uniform != nullptr) {
      a.uniform[b] = static_cast<float>(word >> 8) * 0x1p-24f;
    } else {
      // range is at most 2^32, so the product fits in 64 bits.
      a.integers[b] = a.low + static_cast<int64_t>((word * a.range) >> 32);
    }
  }
}

}  // namespace

void draw_normals(const Normals& a, const Pool& pool) {
  run(pool, normals_of_chunks, a, Chunks(a.layout).count, kChunksPerThread);
}

void draw_single(const Single& a, const Pool& pool) {
  constexpr int64_t samples_per_thread = 1024;
  run(pool, single_of_samples, a, a.batch, samples_per_thread);
}

void philox_block(const Block& a, const Pool&) {
  Lanes lanes;
  philox(a.index, 1, a.stream, a.sample, a.seed, lanes);
  for (int lane = 0; lane < 4; ++lane) a.words[lane] = lanes.words[lane][0];
}

}  // namespace diffpp::noise::DIFFPP_ISA
