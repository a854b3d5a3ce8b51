// Counts the instructions of csrc's kernels for the CPU. While the trap flag is set the processor stops after each one, and a
// signal handler counts: no tool is needed, and no other process can disturb it. `instructions.py` compiles this file and links
// the objects of one instruction set, DIFFPP_ISA.
//
// Nothing counted depends on the machine: data are the same everywhere, one thread does the work, and memory and what kernels
// copy and clear go through the functions below instead of the C library's, which differ from processor to processor.
#include <x86intrin.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>
#include <string>
#include <tuple>

#include "../csrc/ada_layer_norm/arguments.h"
#include "../csrc/add_noise/arguments.h"
#include "../csrc/denoising_loss/arguments.h"
#include "../csrc/gap_loss/arguments.h"
#include "../csrc/geglu/arguments.h"
#include "../csrc/group_norm_silu/arguments.h"
#include "../csrc/noise/arguments.h"
#include "../csrc/reward_pixels/tables.h"
#include "../csrc/score_gap/arguments.h"

namespace {

alignas(64) char heap[1 << 22];
size_t heap_used = 0;

}  // namespace

void* operator new(size_t size, std::align_val_t) {
  void* memory = heap + heap_used;
  heap_used += (size + 63) / 64 * 64;
  if (heap_used > sizeof(heap)) std::abort();
  return memory;
}

void operator delete(void*, std::align_val_t) noexcept {}

// Compiled so that loops do not become calls of what they define.
extern "C" void* memcpy(void* to, const void* from, size_t n) {
  size_t i = 0;
  for (; i + 32 <= n; i += 32)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(static_cast<char*>(to) + i),
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(from) + i)));
  for (; i < n; ++i) static_cast<char*>(to)[i] = static_cast<const char*>(from)[i];
  return to;
}

extern "C" void* memset(void* to, int value, size_t n) {
  size_t i = 0;
  for (; i + 32 <= n; i += 32)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(static_cast<char*>(to) + i), _mm256_set1_epi8(static_cast<char>(value)));
  for (; i < n; ++i) static_cast<char*>(to)[i] = static_cast<char>(value);
  return to;
}

namespace diffpp {
namespace {

const Pool one_thread{
    [] { return int64_t{1}; }, [](int64_t items, int64_t, Pool::Work work, void* context) { work(0, items, context); }};

volatile uint64_t steps = 0;

extern "C" __attribute__((noinline)) uint64_t counted(const std::function<void()>& call) {
  constexpr uint64_t trap = 0x100;
  steps = heap_used = 0;
  __writeeflags(__readeflags() | trap);
  call();
  __writeeflags(__readeflags() & ~trap);
  return steps;
}

// What the names of counted cases begin with.
std::string wanted;

void report(const std::string& name, const std::function<void()>& call) {
  if (name.compare(0, wanted.size(), wanted) != 0) return;
  static const uint64_t around = counted([] {});
  heap_used = 0;
  call();  // Symbols are looked up when they are first used.
  std::printf("%s\t%llu\n", name.c_str(), static_cast<unsigned long long>(counted(call) - around));
  std::fflush(stdout);
}

// Arrays, which are never freed

void* room(int64_t n, Dtype dtype) {
  const int64_t bytes = n * (dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2);
  return std::aligned_alloc(64, (bytes + 63) / 64 * 64);
}

// Numbers from -2 to 2 that bfloat16 holds exactly.
void* values(int64_t n, Dtype dtype) {
  static uint64_t state = 1;
  void* array = room(n, dtype);
  for (int64_t i = 0; i < n; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const float value = (static_cast<float>(state >> 56) - 128.0f) / 64.0f;
    uint32_t pattern;
    __builtin_memcpy(&pattern, &value, 4);
    if (dtype == Dtype::float32)
      static_cast<float*>(array)[i] = value;
    else
      static_cast<uint16_t*>(array)[i] = static_cast<uint16_t>(pattern >> 16);
  }
  return array;
}

PerSample per_sample(int64_t batch, double value) {
  float* numbers = static_cast<float*>(room(batch, Dtype::float32));
  for (int64_t b = 0; b < batch; ++b) numbers[b] = static_cast<float>(value / static_cast<double>(b + 1));
  return {numbers, Dtype::float32, 1};
}

Noise drawn(int64_t batch) {
  int64_t* samples = static_cast<int64_t*>(room(batch, Dtype::float64));
  for (int64_t b = 0; b < batch; ++b) samples[b] = b * ((int64_t{1} << 33) + 1);
  return Noise::drawn(samples, ~uint64_t{2}, 1);
}

Noise stored(int64_t n, Dtype dtype) {
  Noise noise;
  noise.stored = values(n, dtype);
  return noise;
}

// Cases, at one size and in one dtype

struct Place {
  Dtype dtype;
  std::string suffix;  // of names

  void report(const std::string& name, const std::function<void()>& call) const {
    diffpp::report(name + ": " + (dtype == Dtype::float32 ? "float32 " : "bfloat16 ") + suffix, call);
  }
  void* values(int64_t n) const { return diffpp::values(n, dtype); }
  void* room(int64_t n) const { return diffpp::room(n, dtype); }
};

// Statistics in the dtype of the arithmetic.
void* statistics(int64_t n) { return room(n, Dtype::float32); }

void count_noise(const Place& place, int64_t batch, int64_t pixels) {
  using namespace noise;
  const int64_t n = batch * 4 * pixels;
  const Normals normals{place.room(n), place.dtype, {batch, 1, 4 * pixels}, drawn(batch)};
  place.report("noise draw_normals", [&] { DIFFPP_ISA::draw_normals(normals, one_thread); });
  if (place.dtype != Dtype::float32) return;
  Single single{batch, static_cast<float*>(statistics(batch)), nullptr, 0, 0, drawn(batch)};
  place.report("noise draw_single, uniform", [&] { DIFFPP_ISA::draw_single(single, one_thread); });
  single = {batch, nullptr, static_cast<int64_t*>(room(batch, Dtype::float64)), -5, 1u << 31, drawn(batch)};
  place.report("noise draw_single, integers", [&] { DIFFPP_ISA::draw_single(single, one_thread); });
}

void count_add_noise(const Place& place, int64_t batch, int64_t pixels) {
  using namespace add_noise;
  const int64_t n = batch * 4 * pixels;
  Forward forward{place.values(n),          place.room(n),            place.dtype, {batch, 1, 4 * pixels},
                  per_sample(batch, 0.75), per_sample(batch, 0.5), stored(n, place.dtype)};
  place.report("add_noise forward, stored", [&] { DIFFPP_ISA::forward(forward, one_thread); });
  forward.noise = drawn(batch);
  forward.layout = {batch, 4, pixels};
  place.report("add_noise forward, drawn, channels_last", [&] { DIFFPP_ISA::forward(forward, one_thread); });
  const Backward backward{forward.x0, forward.x_t, place.dtype, {batch, 1, 4 * pixels}, forward.alpha};
  place.report("add_noise backward", [&] { DIFFPP_ISA::backward(backward, one_thread); });
}

Target target(const Place& place, int64_t batch, int64_t n, Prediction prediction, const Noise& noise) {
  return {prediction, place.values(n), noise, per_sample(batch, 0.75), per_sample(batch, 0.5)};
}

void count_denoising_loss(const Place& place, int64_t batch, int64_t pixels) {
  using namespace denoising_loss;
  const int64_t n = batch * 4 * pixels;
  const Layout layout{batch, 1, 4 * pixels};
  Forward forward{place.values(n), place.room(n), place.dtype, layout, {}, per_sample(batch, 1.0), statistics(1)};
  forward.target = target(place, batch, n, Prediction::v_prediction, stored(n, place.dtype));
  place.report("denoising_loss forward, stored", [&] { DIFFPP_ISA::forward(forward, one_thread); });
  forward.target = target(place, batch, n, Prediction::epsilon, drawn(batch));
  place.report("denoising_loss forward, drawn", [&] { DIFFPP_ISA::forward(forward, one_thread); });
  const PerSample outer{per_sample(1, 1.0).data, Dtype::float32, 0};
  const Backward backward{forward.residual, place.room(n), place.dtype, layout, outer, forward.weight};
  place.report("denoising_loss backward", [&] { DIFFPP_ISA::backward(backward, one_thread); });
}

Outputs outputs(const Place& place, int64_t batch, int64_t n) {
  return {place.values(n), place.values(n), place.values(n), 4.5, place.dtype, {batch, 1, n / batch}, false, {}};
}

void count_score_gap(const Place& place, int64_t batch, int64_t pixels) {
  using namespace score_gap;
  const int64_t n = batch * 4 * pixels;
  Arguments call{outputs(place, batch, n), 1.0, per_sample(batch, 1.0), false, place.room(n), statistics(batch),
                 statistics(batch),        statistics(batch),    {}};
  place.report("score_gap forward, guided", [&] { DIFFPP_ISA::forward(call, one_thread); });
  call.outputs.has_target = call.mean_abs = true;
  call.outputs.target = target(place, batch, n, Prediction::epsilon, stored(n, place.dtype));
  place.report("score_gap forward, mean_abs, stored", [&] { DIFFPP_ISA::forward(call, one_thread); });
  call.reward = {place.values(n),   1.0, per_sample(batch, 0.25), 0.05, statistics(batch), statistics(batch),
                 statistics(batch)};
  place.report("score_gap forward, mean_abs, stored, reward", [&] { DIFFPP_ISA::forward(call, one_thread); });
  call.reward = {};
  call.outputs.target.noise = drawn(batch);
  place.report("score_gap forward, mean_abs, drawn", [&] { DIFFPP_ISA::forward(call, one_thread); });
}

void count_gap_loss(const Place& place, int64_t batch, int64_t pixels) {
  using namespace gap_loss;
  const int64_t n = batch * 4 * pixels;
  Outputs given = outputs(place, batch, n);
  given.has_target = true;
  given.target = target(place, batch, n, Prediction::flow_prediction, stored(n, place.dtype));
  Forward forward{given, Kind::sid, 1.2, statistics(batch), statistics(batch), nullptr};
  place.report("gap_loss forward, sid", [&] { DIFFPP_ISA::forward(forward, one_thread); });
  forward = {given, Kind::sim, 1.0, statistics(batch), statistics(batch), statistics(batch)};
  place.report("gap_loss forward, sim", [&] { DIFFPP_ISA::forward(forward, one_thread); });
  const PerSample factor{forward.factor, Dtype::float32, 1}, shrink{forward.shrink, Dtype::float32, 1};
  const Backward backward{given,         2.0,           per_sample(batch, 1.0), factor,        shrink,
                          place.room(n), place.room(n), place.room(n),          place.room(n)};
  place.report("gap_loss backward", [&] { DIFFPP_ISA::backward(backward, one_thread); });
}

// Groups of eight channels of x [batch, channels, side, side].
void count_group_norm_silu(const Place& place, int64_t batch, int64_t channels, int64_t side, bool channels_last) {
  using namespace group_norm_silu;
  const Shape shape{batch, channels, side * side, channels / 8, channels_last};
  const int64_t n = batch * channels * shape.pixels, groups = batch * shape.groups;
  const std::string layout = channels_last ? ", channels_last" : "";
  const Inputs inputs{shape, place.dtype, true, place.values(n), per_sample(channels, 1.0), per_sample(channels, 0.5)};
  Forward forward{inputs, 1e-5, place.room(n), nullptr, nullptr, statistics(groups), statistics(groups)};
  place.report("group_norm_silu forward" + layout, [&] { DIFFPP_ISA::forward(forward, one_thread); });
  Backward backward{inputs,       place.values(n),      nullptr,             forward.mean,
                    forward.rstd, place.room(n), nullptr, nullptr};
  place.report("group_norm_silu backward, frozen" + layout, [&] { DIFFPP_ISA::backward(backward, one_thread); });
  backward.grad_weight = statistics(channels);
  backward.grad_bias = statistics(channels);
  place.report("group_norm_silu backward, trained" + layout, [&] { DIFFPP_ISA::backward(backward, one_thread); });
  forward.residual = place.values(n);
  forward.sum = place.room(n);
  place.report("group_norm_silu forward, residual" + layout, [&] { DIFFPP_ISA::forward(forward, one_thread); });
}

void count_geglu(const Place& place, int64_t rows, int64_t half) {
  using namespace geglu;
  const Forward forward{{rows, half}, place.dtype, place.values(2 * rows * half), place.room(rows * half)};
  place.report("geglu forward", [&] { DIFFPP_ISA::forward(forward, one_thread); });
  const Backward backward{
      {rows, half}, place.dtype, place.values(rows * half), forward.x, place.room(2 * rows * half)};
  place.report("geglu backward", [&] { DIFFPP_ISA::backward(backward, one_thread); });
}

void count_ada_layer_norm(const Place& place, int64_t batch, int64_t rows, int64_t width) {
  using namespace ada_layer_norm;
  const Shape shape{batch, rows, width};
  const int64_t n = batch * rows * width;
  const auto modulation = [&] { return PerColumn{place.values(batch * width), place.dtype, width}; };
  const Forward forward{shape, place.dtype,   1e-5, place.values(n), modulation(), modulation(),
                        place.room(n), statistics(batch * rows), statistics(batch * rows)};
  place.report("ada_layer_norm forward", [&] { DIFFPP_ISA::forward(forward, one_thread); });
  const Backward backward{shape,        place.dtype,   place.values(n), forward.x,
                          forward.mean, forward.rstd,  forward.scale,   place.room(n),
                          place.room(batch * width), place.room(batch * width)};
  place.report("ada_layer_norm backward", [&] { DIFFPP_ISA::backward(backward, one_thread); });
}

// Three channels of side x side pixels to 7/16 of that.
void count_reward_pixels(const Place& place, int64_t side, bool channels_last) {
  using namespace reward_pixels;
  const double mean[] = {0.5, 0.5, 0.5}, std[] = {0.25, 0.25, 0.25};
  const int64_t size = side * 7 / 16, large = 3 * side * side, little = 3 * size * size;
  const Resize resize{side, side, size, Fit::crop, Filter::bicubic, true};
  const AxisTable table = axis_table(resize);
  const Weights forward(table), adjoint(transposed(table));
  const void* images = place.values(large);
  const int64_t inner = channels_last ? 3 : 1;
  const Arguments given{false,      resize,     resize, images, place.room(little), nullptr,
                        place.dtype, place.dtype, false,  3 / inner, inner, 3, mean, std, -1.0, 1.0, true};
  const Resampling down{given, forward.view(false), adjoint.view(false), forward.view(false)};
  const std::string layout = channels_last ? ", channels_last" : "";
  place.report("reward_pixels resample, forward" + layout, [&] { DIFFPP_ISA::resample(down, one_thread); });
  Arguments back = given;
  back.adjoint = true;
  back.from = place.values(little);
  back.to = place.room(large);
  back.images = images;
  const Resampling up{back, adjoint.view(false), forward.view(false), adjoint.view(false)};
  place.report("reward_pixels resample, backward" + layout, [&] { DIFFPP_ISA::resample(up, one_thread); });
}

// A part of a chunk, then more than one.
void count_all() {
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
    for (const auto& [name, batch, pixels] : {std::tuple{"2x4x8x8", 2, 64}, std::tuple{"1x4x24x24", 1, 576}}) {
      const Place place{dtype, name};
      count_noise(place, batch, pixels);
      count_add_noise(place, batch, pixels);
      count_denoising_loss(place, batch, pixels);
      count_score_gap(place, batch, pixels);
      count_gap_loss(place, batch, pixels);
    }
    for (const bool channels_last : {false, true}) {
      count_group_norm_silu({dtype, "2x16x6x6"}, 2, 16, 6, channels_last);
      count_group_norm_silu({dtype, "1x16x14x14"}, 1, 16, 14, channels_last);
    }
    // As decoders have them.
    const bool channels_last = dtype == Dtype::bfloat16;
    count_reward_pixels({dtype, "1x3x16x16"}, 16, channels_last);
    count_reward_pixels({dtype, "1x3x32x32"}, 32, channels_last);
    count_geglu({dtype, "2x128"}, 2, 64);
    count_geglu({dtype, "3x1000"}, 3, 500);
    count_ada_layer_norm({dtype, "1x2x128"}, 1, 2, 128);
    count_ada_layer_norm({dtype, "2x2x600"}, 2, 2, 600);
  }
}

}  // namespace
}  // namespace diffpp

int main(int argc, char** argv) {
  if (argc > 1) diffpp::wanted = argv[1];
  struct sigaction action = {};
  action.sa_handler = [](int) { diffpp::steps = diffpp::steps + 1; };
  sigaction(SIGTRAP, &action, nullptr);
#if defined(__clang__)
  std::printf("%s\n", __VERSION__);
#else
  std::printf("gcc %s\n", __VERSION__);
#endif
  diffpp::count_all();
}
