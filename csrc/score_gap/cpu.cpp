#include "../common/cpu_noise.h"
#include "arguments.h"

namespace diffpp::score_gap::DIFFPP_ISA {
namespace {

template <typename T>
inline T scale_of(const Arguments& a, int64_t b) {
  return number<T>(a.scales, b, static_cast<T>(a.scale));
}

// The sums of a chunk, and factor d to `gradient` where `write`.
template <bool target, bool write, typename E, bool guidance>
inline void chunk_sums(const GapRuns<E, guidance> runs, int64_t n, Wide<E> factor, E* gradient, double* sums) {
  using T = Wide<E>;
  sums[0] = sums[1] = sums[2] = 0.0;
  for (int64_t start = 0; start < n; start += kSumRun) {
    const int64_t stop = smaller(start + kSumRun, n);
    T gap_sq = 0, residual_abs = 0, gap_dot_residual = 0;
#pragma omp simd reduction(+ : gap_sq, residual_abs, gap_dot_residual)
    for (int64_t i = start; i < stop; ++i) {
      const T d = runs.gap(i);
      gap_sq += d * d;
      if constexpr (target) {
        const T r = runs.residual(i);
        residual_abs += magnitude(r);
        gap_dot_residual += d * r;
      }
      if constexpr (write) narrow(factor * d, gradient[i]);
    }
    sums[0] += static_cast<double>(gap_sq);
    sums[1] += static_cast<double>(residual_abs);
    sums[2] += static_cast<double>(gap_dot_residual);
  }
}

// With mean_abs the gradient holds d until it is normalised if it can hold it unrounded; else d is made again then.
inline bool keeps_gap(const Arguments& a) {
  return a.outputs.dtype == Dtype::float32 || a.outputs.dtype == Dtype::float64;
}

template <typename E>
void sums(const Arguments& a, int64_t begin, int64_t end) {
  using T = Wide<E>;
  GapScratch<E> scratch;
  const Outputs& outputs = a.outputs;
  const Chunks chunks(outputs.layout);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunks[item];
    double* const partial = a.partials + 3 * item;
    with_gap_runs(outputs, chunk, outputs.has_target, scratch, [&](const auto runs) {
      if (a.mean_abs && !keeps_gap(a)) {
        chunk_sums<true, false>(runs, chunk.n, T(1), static_cast<E*>(nullptr), partial);
        return;
      }
      const T factor = a.mean_abs ? T(1) : scale_of<T>(a, chunk.b);
      E* gradient = destination(a.gradient, outputs.dtype, chunk.offset, scratch.fake);
      outputs.has_target ? chunk_sums<true, true>(runs, chunk.n, factor, gradient, partial)
                         : chunk_sums<false, true>(runs, chunk.n, factor, gradient, partial);
      store(gradient, a.gradient, outputs.dtype, chunk.offset, chunk.n);
    });
  }
}

template <typename E>
void normalize(const Arguments& a, int64_t begin, int64_t end) {
  using T = Wide<E>;
  GapScratch<E> scratch;
  const Outputs& outputs = a.outputs;
  const Chunks chunks(outputs.layout);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunks[item];
    const T mean = static_cast<const T*>(a.residual_abs)[chunk.b];
    const T floor = static_cast<T>(kMeanAbsFloor);
    const T factor = scale_of<T>(a, chunk.b) / (mean < floor ? floor : mean);
    E* gradient = destination(a.gradient, outputs.dtype, chunk.offset, scratch.fake);
    if (keeps_gap(a)) {
#pragma omp simd
      for (int64_t i = 0; i < chunk.n; ++i) narrow(factor * widen(gradient[i]), gradient[i]);
      continue;
    }
    with_gap_runs(outputs, chunk, false, scratch, [&](const auto runs) {
#pragma omp simd
      for (int64_t i = 0; i < chunk.n; ++i) narrow(factor * runs.gap(i), gradient[i]);
    });
    store(gradient, a.gradient, outputs.dtype, chunk.offset, chunk.n);
  }
}

void statistics(const Arguments& a, int64_t begin, int64_t end) {
  const Outputs& outputs = a.outputs;
  const Chunks chunks(outputs.layout);
  for (int64_t b = begin; b < end; ++b) {
    double gap_sq = 0.0, residual_abs = 0.0, gap_dot_residual = 0.0;
    for (int64_t c = 0; c < chunks.per_sample; ++c) {
      const double* partial = a.partials + 3 * (b * chunks.per_sample + c);
      gap_sq += partial[0];
      residual_abs += partial[1];
      gap_dot_residual += partial[2];
    }
    put(a.gap_sq, outputs.dtype, b, gap_sq);
    if (!outputs.has_target) continue;
    put(a.residual_abs, outputs.dtype, b, residual_abs / static_cast<double>(chunks.sample));
    put(a.gap_dot_residual, outputs.dtype, b, gap_dot_residual);
  }
}

// All stages on whole samples, so that the last finds its data in the cache.
template <typename E>
void samples(const Arguments& a, int64_t begin, int64_t end) {
  const int64_t per_sample = Chunks(a.outputs.layout).per_sample;
  for (int64_t b = begin; b < end; ++b) {
    sums<E>(a, b * per_sample, (b + 1) * per_sample);
    statistics(a, b, b + 1);
    if (a.mean_abs) normalize<E>(a, b * per_sample, (b + 1) * per_sample);
  }
}

// Either way makes the same numbers in the same order; whole samples leave threads idle where there are few of them.
template <typename E>
void stages(const Arguments& a, const Pool& pool) {
  const Chunks chunks(a.outputs.layout);
  const int64_t batch = a.outputs.layout.batch, threads = pool.threads();
  if (batch % threads == 0 || batch >= 4 * threads) {
    run(pool, samples<E>, a, batch, (kChunksPerThread + chunks.per_sample - 1) / chunks.per_sample);
  } else {
    run(pool, sums<E>, a, chunks.count, kChunksPerThread);
    statistics(a, 0, batch);
    if (a.mean_abs) run(pool, normalize<E>, a, chunks.count, kChunksPerThread);
  }
}

}  // namespace

void forward(const Arguments& arguments, const Pool& pool) {
  Arguments a = arguments;
  const Memory partials(3 * Chunks(a.outputs.layout).count * static_cast<int64_t>(sizeof(double)));
  a.partials = partials.doubles();
  by_elements(a.outputs.dtype, [&](auto element) { stages<decltype(element)>(a, pool); });
}

}  // namespace diffpp::score_gap::DIFFPP_ISA
