#include "../common/cpu_noise.h"
#include "arguments.h"

namespace diffpp::score_gap::DIFFPP_ISA {
namespace {

template <typename T>
inline T scale_of(const Arguments& a, int64_t b) {
  return number<T>(a.scales, b, static_cast<T>(a.scale));
}

// The reward's score in a chunk, and the factor that it is taken with.
template <typename E>
struct RewardRun {
  const E* score;
  Wide<E> factor;

  Wide<E> operator()(int64_t i) const { return widen(score[i]); }
};

template <typename E>
struct NoReward {
  static constexpr Wide<E> factor = 0;

  Wide<E> operator()(int64_t) const { return 0; }
};

template <typename Run>
constexpr bool kRewarded = true;
template <typename E>
constexpr bool kRewarded<NoReward<E>> = false;

// The sums of a chunk, and factor d, less the reward's term, to `gradient` where `write`.
template <bool target, bool write, typename E, bool guidance, typename Reward>
inline void chunk_sums(
    const GapRuns<E, guidance> runs, const Reward reward, int64_t n, Wide<E> factor, E* gradient, double* sums) {
  using T = Wide<E>;
  constexpr bool rewarded = kRewarded<Reward>;
  for (int k = 0; k < (rewarded ? 5 : 3); ++k) sums[k] = 0.0;
  for (int64_t start = 0; start < n; start += kSumRun) {
    const int64_t stop = smaller(start + kSumRun, n);
    T gap_sq = 0, residual_abs = 0, gap_dot_residual = 0, reward_sq = 0, gap_dot_reward = 0;
#pragma omp simd reduction(+ : gap_sq, residual_abs, gap_dot_residual, reward_sq, gap_dot_reward)
    for (int64_t i = start; i < stop; ++i) {
      const T d = runs.gap(i);
      gap_sq += d * d;
      if constexpr (target) {
        const T r = runs.residual(i);
        residual_abs += magnitude(r);
        gap_dot_residual += d * r;
      }
      if constexpr (rewarded) {
        const T s = reward(i);
        reward_sq += s * s;
        gap_dot_reward += d * s;
        if constexpr (write) narrow(madd(-reward.factor, s, factor * d), gradient[i]);
      } else if constexpr (write) {
        narrow(factor * d, gradient[i]);
      }
    }
    sums[0] += static_cast<double>(gap_sq);
    sums[1] += static_cast<double>(residual_abs);
    sums[2] += static_cast<double>(gap_dot_residual);
    if constexpr (rewarded) {
      sums[3] += static_cast<double>(reward_sq);
      sums[4] += static_cast<double>(gap_dot_reward);
    }
  }
}

template <typename E>
struct Scratch {
  GapScratch<E> outputs;
  alignas(64) E score[kChunk];
};

// Calls `work` with the reward's run of a chunk, or with NoReward.
template <typename E, typename Work>
inline void with_reward_run(const Arguments& a, const Chunk& chunk, Wide<E> share, E* scratch, const Work& work) {
  if (a.reward.score == nullptr) return work(NoReward<E>());
  const Wide<E> factor = number<Wide<E>>(a.reward.scales, chunk.b, static_cast<Wide<E>>(a.reward.scale));
  work(RewardRun<E>{load(a.reward.score, a.outputs.dtype, chunk.offset, chunk.n, scratch), share * factor});
}

// With mean_abs and no reward the gradient holds d until it is normalised if it can hold it unrounded; else d is made again.
inline bool keeps_gap(const Arguments& a) {
  return a.reward.score == nullptr && (a.outputs.dtype == Dtype::float32 || a.outputs.dtype == Dtype::float64);
}

template <typename E>
void sums(const Arguments& a, int64_t begin, int64_t end) {
  using T = Wide<E>;
  Scratch<E> scratch;
  const Outputs& outputs = a.outputs;
  const Chunks chunks(outputs.layout);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunks[item];
    double* const partial = a.partials + a.sums() * item;
    with_reward_run<E>(a, chunk, T(1), scratch.score, [&](const auto reward) {
      with_gap_runs(outputs, chunk, outputs.has_target, scratch.outputs, [&](const auto runs) {
        if (a.mean_abs && !keeps_gap(a)) {
          chunk_sums<true, false>(runs, reward, chunk.n, T(1), static_cast<E*>(nullptr), partial);
          return;
        }
        const T factor = a.mean_abs ? T(1) : scale_of<T>(a, chunk.b);
        E* gradient = destination(a.gradient, outputs.dtype, chunk.offset, scratch.outputs.fake);
        outputs.has_target ? chunk_sums<true, true>(runs, reward, chunk.n, factor, gradient, partial)
                           : chunk_sums<false, true>(runs, reward, chunk.n, factor, gradient, partial);
        store(gradient, a.gradient, outputs.dtype, chunk.offset, chunk.n);
      });
    });
  }
}

// The share of a sample's reward term.
template <typename T>
inline T share_of(const Arguments& a, int64_t b) {
  return a.reward.score == nullptr ? T(1) : static_cast<const T*>(a.reward.share)[b];
}

// Whether what the sums left as the gradient of a sample is not the result.
template <typename T>
inline bool unsettled(const Arguments& a, int64_t b) {
  return a.mean_abs || share_of<T>(a, b) != T(1);
}

// The gradient of what the statistics settle: a normaliser, a share of the reward's term.
template <typename E>
void settle(const Arguments& a, int64_t begin, int64_t end) {
  using T = Wide<E>;
  Scratch<E> scratch;
  const Outputs& outputs = a.outputs;
  const Chunks chunks(outputs.layout);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunks[item];
    if (!unsettled<T>(a, chunk.b)) continue;
    const T floor = static_cast<T>(kMeanAbsFloor);
    const T mean = a.mean_abs ? static_cast<const T*>(a.residual_abs)[chunk.b] : T(1);
    const T divisor = mean < floor ? floor : mean;
    const T factor = scale_of<T>(a, chunk.b) / divisor;
    E* gradient = destination(a.gradient, outputs.dtype, chunk.offset, scratch.outputs.fake);
    if (keeps_gap(a)) {
#pragma omp simd
      for (int64_t i = 0; i < chunk.n; ++i) narrow(factor * widen(gradient[i]), gradient[i]);
      continue;
    }
    const T share = share_of<T>(a, chunk.b);
    with_gap_runs(outputs, chunk, false, scratch.outputs, [&](const auto runs) {
      if (a.reward.score == nullptr || share == T(0)) {
#pragma omp simd
        for (int64_t i = 0; i < chunk.n; ++i) narrow(factor * runs.gap(i), gradient[i]);
        return;
      }
      with_reward_run<E>(a, chunk, share / divisor, scratch.score, [&](const auto reward) {
#pragma omp simd
        for (int64_t i = 0; i < chunk.n; ++i) narrow(madd(-reward.factor, reward(i), factor * runs.gap(i)), gradient[i]);
      });
    });
    store(gradient, a.gradient, outputs.dtype, chunk.offset, chunk.n);
  }
}

// The share of the reward's term, by the sums of d^2 and s^2.
template <typename T>
T reward_share(const Arguments& a, int64_t b, double gap_sq, double reward_sq) {
  const T scale = magnitude(scale_of<T>(a, b));
  const T length = magnitude(number<T>(a.reward.scales, b, static_cast<T>(a.reward.scale))) * root(static_cast<T>(reward_sq));
  if (!(length - length == T(0))) return T(0);
  const T limit = static_cast<T>(a.reward.clip) * scale * root(static_cast<T>(gap_sq));
  return length > limit ? limit / length : T(1);
}

template <typename T>
void statistics(const Arguments& a, int64_t begin, int64_t end) {
  const Outputs& outputs = a.outputs;
  const Chunks chunks(outputs.layout);
  for (int64_t b = begin; b < end; ++b) {
    double totals[5] = {};
    for (int64_t c = 0; c < chunks.per_sample; ++c) {
      const double* partial = a.partials + a.sums() * (b * chunks.per_sample + c);
      for (int k = 0; k < a.sums(); ++k) totals[k] += partial[k];
    }
    put(a.gap_sq, outputs.dtype, b, totals[0]);
    if (outputs.has_target) {
      put(a.residual_abs, outputs.dtype, b, totals[1] / static_cast<double>(chunks.sample));
      put(a.gap_dot_residual, outputs.dtype, b, totals[2]);
    }
    if (a.reward.score == nullptr) continue;
    put(a.reward.reward_sq, outputs.dtype, b, totals[3]);
    put(a.reward.gap_dot_reward, outputs.dtype, b, totals[4]);
    static_cast<T*>(a.reward.share)[b] = reward_share<T>(a, b, totals[0], totals[3]);
  }
}

// All stages on whole samples, so that the last finds its data in the cache.
template <typename E>
void samples(const Arguments& a, int64_t begin, int64_t end) {
  const int64_t per_sample = Chunks(a.outputs.layout).per_sample;
  for (int64_t b = begin; b < end; ++b) {
    sums<E>(a, b * per_sample, (b + 1) * per_sample);
    statistics<Wide<E>>(a, b, b + 1);
    if (unsettled<Wide<E>>(a, b)) settle<E>(a, b * per_sample, (b + 1) * per_sample);
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
    statistics<Wide<E>>(a, 0, batch);
    bool settled = true;
    for (int64_t b = 0; b < batch; ++b) settled = settled && !unsettled<Wide<E>>(a, b);
    if (!settled) run(pool, settle<E>, a, chunks.count, kChunksPerThread);
  }
}

}  // namespace

void forward(const Arguments& arguments, const Pool& pool) {
  Arguments a = arguments;
  const Memory partials(a.sums() * Chunks(a.outputs.layout).count * static_cast<int64_t>(sizeof(double)));
  a.partials = partials.doubles();
  by_elements(a.outputs.dtype, [&](auto element) { stages<decltype(element)>(a, pool); });
}

}  // namespace diffpp::score_gap::DIFFPP_ISA
