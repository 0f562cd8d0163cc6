// The kernels of the GPU backend: all that is not a matrix product.
//
// Compiled by NVRTC when a GPU is opened, and by the C++ compiler of the tests together with
// `shim.h`, which runs a block's threads in turns; so no warp intrinsics, no atomics, no static
// shared memory, and every thread of a block meets every barrier. Matrices are row-major. A block
// has a power of two of threads; one block a row where a comment says so. Sums run in a fixed
// order, so equal inputs give equal bits on one kind of GPU.

#ifndef HOST_SHIM
#define SHARED(name) extern __shared__ float name[]
#endif

typedef unsigned int u32;
typedef unsigned long long u64;

// Stands for a score that is not seen, and for "no maximum yet".
#define UNSEEN (-3.0e38f)

// The sum of all threads' values, for all of them. `room` has a value for each thread.
__device__ float block_sum(float value, float* room) {
  const int t = threadIdx.x;
  room[t] = value;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (t < half) room[t] += room[t + half];
    __syncthreads();
  }
  const float sum = room[0];
  __syncthreads();
  return sum;
}

__device__ float block_max(float value, float* room) {
  const int t = threadIdx.x;
  room[t] = value;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (t < half) room[t] = room[t] < room[t + half] ? room[t + half] : room[t];
    __syncthreads();
  }
  const float most = room[0];
  __syncthreads();
  return most;
}

// The place of this thread among all, and their number.
__device__ u64 place() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ u64 places() { return (u64)gridDim.x * blockDim.x; }

// One block a row: `out[row] = table[index[row]]`.
extern "C" __global__ void gather(float* out, const float* table, const u32* index, int width) {
  const float* from = table + (u64)index[blockIdx.x] * width;
  float* to = out + (u64)blockIdx.x * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

// One block a row: `x[index[row]] += from[row]`; no index comes twice.
extern "C" __global__ void scatter_add(float* x, const float* from, const u32* index, int width) {
  float* to = x + (u64)index[blockIdx.x] * width;
  const float* row = from + (u64)blockIdx.x * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] += row[i];
}

// One block a row: `out = x / rms(x) · weight`, `inverse = 1 / rms(x)`. `out` may be `x`.
extern "C" __global__ void rms_norm(float* out, float* inverse, const float* x,
                                    const float* weight, float eps, int width) {
  SHARED(room);
  const float* row = x + (u64)blockIdx.x * width;
  float* to = out + (u64)blockIdx.x * width;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < width; i += blockDim.x) squares += row[i] * row[i];
  const float mean = block_sum(squares, room) / width;
  const float scale = 1.0f / sqrtf(mean + eps);
  for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = row[i] * scale * weight[i];
  if (threadIdx.x == 0) inverse[blockIdx.x] = scale;
}

// One block a row: the same result again, from `inverse`.
extern "C" __global__ void rms_norm_again(float* out, const float* inverse, const float* x,
                                          const float* weight, int width) {
  const u64 start = (u64)blockIdx.x * width;
  const float scale = inverse[blockIdx.x];
  for (int i = threadIdx.x; i < width; i += blockDim.x)
    out[start + i] = x[start + i] * scale * weight[i];
}

// One block a row: the gradient of `x`, added to `dx` or in its place.
extern "C" __global__ void rms_norm_backward(float* dx, const float* dy, const float* inverse,
                                             const float* x, const float* weight, int width,
                                             int add) {
  SHARED(room);
  const u64 start = (u64)blockIdx.x * width;
  float part = 0.0f;
  for (int i = threadIdx.x; i < width; i += blockDim.x)
    part += dy[start + i] * weight[i] * x[start + i];
  const float dot = block_sum(part, room);
  const float scale = inverse[blockIdx.x];
  const float along = dot * scale * scale * scale / width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    const float d = dy[start + i] * weight[i] * scale - x[start + i] * along;
    dx[start + i] = add ? dx[start + i] + d : d;
  }
}

// One block a row: `x += bias`.
extern "C" __global__ void add_bias(float* x, const float* bias, int width) {
  float* row = x + (u64)blockIdx.x * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] += bias[i];
}

// One block a row: turns every head by the angles of the row's position, or back (`sign` -1).
extern "C" __global__ void rotate(float* x, const float* cosines, const float* sines, int heads,
                                  int dim, float sign) {
  const int half = dim / 2;
  float* row = x + (u64)blockIdx.x * heads * dim;
  const float* cosine = cosines + (u64)blockIdx.x * half;
  const float* sine = sines + (u64)blockIdx.x * half;
  for (int i = threadIdx.x; i < heads * half; i += blockDim.x) {
    float* low = row + i / half * dim + i % half;
    const float a = low[0], b = low[half];
    const float c = cosine[i % half], s = sign * sine[i % half];
    low[0] = a * c - b * s;
    low[half] = b * c + a * s;
  }
}

// `x += y`.
extern "C" __global__ void add(float* x, const float* y, u64 n) {
  for (u64 i = place(); i < n; i += places()) x[i] += y[i];
}

// Both activations are `x · sigmoid(a(x))`; this is `a` and its slope. 0 is SiLU, 1 is GELU by its
// tanh approximation.
__device__ float argument(int activation, float x) {
  return activation == 0 ? x : 1.595769f * x * (1.0f + 0.044715f * x * x);
}
__device__ float slope(int activation, float x) {
  return activation == 0 ? 1.0f : 1.595769f * (1.0f + 3.0f * 0.044715f * x * x);
}
__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// `out = activation(gate) · up`. `out` may be `gate`.
extern "C" __global__ void glu(float* out, const float* gate, const float* up, u64 n,
                               int activation) {
  for (u64 i = place(); i < n; i += places())
    out[i] = gate[i] * sigmoid(argument(activation, gate[i])) * up[i];
}

// From the gradient of the result, in `d`, to those of `gate` and `up`, over the values
// themselves; `d` becomes the result.
extern "C" __global__ void glu_backward(float* d, float* gate, float* up, u64 n, int activation) {
  for (u64 i = place(); i < n; i += places()) {
    const float dy = d[i], x = gate[i], u = up[i];
    const float s = sigmoid(argument(activation, x));
    d[i] = x * s * u;
    gate[i] = dy * u * s * (1.0f + x * (1.0f - s) * slope(activation, x));
    up[i] = dy * (x * s);
  }
}

// The finaliser of SplitMix64, as the CPU has it.
__device__ u64 mix(u64 value) {
  u64 z = value + 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// `out = x · keep` where it is kept, zero elsewhere. `out` may be `x`.
extern "C" __global__ void dropout(float* out, const float* x, u64 n, u64 key, u64 limit,
                                   float keep) {
  for (u64 i = place(); i < n; i += places())
    out[i] = (mix(key + i) >> 32) < limit ? 0.0f : x[i] * keep;
}

// One block a row: to where `slots` says, three numbers a row: address of the row's keys in the
// first layer, values from one layer to the next, values from the keys to the values.
extern "C" __global__ void append(const float* k, const float* v, const u64* slots, int layer,
                                  int width) {
  const u64* slot = slots + 3 * (u64)blockIdx.x;
  float* to = (float*)slot[0] + layer * slot[1];
  const u64 start = (u64)blockIdx.x * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    to[i] = k[start + i];
    to[slot[2] + i] = v[start + i];
  }
}

// One block a row of logits: leaves the probabilities less one at the target, and in `losses`
// the cross entropy and whether no other token is likelier.
extern "C" __global__ void cross_entropy(float* logits, const u32* targets, float* losses,
                                         int vocab) {
  SHARED(room);
  float* row = logits + (u64)blockIdx.x * vocab;
  const u32 target = targets[blockIdx.x];
  const float logit = row[target];
  float most = UNSEEN;
  for (int i = threadIdx.x; i < vocab; i += blockDim.x) most = row[i] > most ? row[i] : most;
  most = block_max(most, room);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
    row[i] = expf(row[i] - most);
    sum += row[i];
  }
  sum = block_sum(sum, room);
  const float scale = 1.0f / sum;
  for (int i = threadIdx.x; i < vocab; i += blockDim.x)
    row[i] = row[i] * scale - (i == (int)target ? 1.0f : 0.0f);
  if (threadIdx.x == 0) {
    losses[2 * blockIdx.x] = most + logf(sum) - logit;
    losses[2 * blockIdx.x + 1] = logit >= most ? 1.0f : 0.0f;
  }
}

// Attention. A *run* is neighbouring rows of one sequence. What it sees lies in *segments* of keys
// and values, the last of which ends with the run's own rows. The query heads that share a key
// head are computed together: a *pair* is a row of the run and one of these heads, numbered row by
// row. A block takes one key head (`blockIdx.y`) and a *tile* of at most `block_rows` pairs.
//
// runs:     first row, rows, first segment, segment after the last
// tiles:    run, first pair
// segments: address of the keys, of the values, values from one layer to the next, tokens

struct Tile {
  int row, rows, from, to, first, count, total, group;
};

__device__ Tile tile_of(const int* runs, const int* tiles, const u64* segments, int heads,
                        int kv_heads, int block_rows) {
  Tile tile;
  const int* run = runs + 4 * tiles[2 * blockIdx.x];
  tile.row = run[0];
  tile.rows = run[1];
  tile.from = run[2];
  tile.to = run[3];
  tile.first = tiles[2 * blockIdx.x + 1];
  tile.group = heads / kv_heads;
  const int left = tile.rows * tile.group - tile.first;
  tile.count = left < block_rows ? left : block_rows;
  tile.total = 0;
  for (int s = tile.from; s < tile.to; s++) tile.total += (int)segments[4 * s + 3];
  return tile;
}

// Where the values of a pair of the tile lie in `[rows, heads, dim]`, in values.
__device__ u64 pair_at(const Tile& tile, int r, int heads, int dim) {
  const int pair = tile.first + r, row = tile.row + pair / tile.group;
  return ((u64)row * heads + blockIdx.y * tile.group + pair % tile.group) * dim;
}

// The column after the last that a pair of the tile sees.
__device__ int end_of(const Tile& tile, int r) {
  return tile.total - tile.rows + (tile.first + r) / tile.group + 1;
}

__device__ bool seen(const Tile& tile, int r, int column, int window) {
  const int end = end_of(tile, r);
  return r < tile.count && column < end && (window == 0 || column >= end - window);
}

// `to[r] = from` of every pair, zero where there is none.
__device__ void load_pairs(float* to, const float* from, const Tile& tile, int heads, int dim,
                           int block_rows, float scale) {
  for (int i = threadIdx.x; i < block_rows * dim; i += blockDim.x) {
    const int r = i / dim;
    to[i] = r < tile.count ? from[pair_at(tile, r, heads, dim) + i % dim] * scale : 0.0f;
  }
}

// `n` rows of one key head into `[block_keys, dim + 1]`, zero after them.
__device__ void load_rows(float* to, const float* from, int n, int dim, int stride,
                          int block_keys) {
  for (int i = threadIdx.x; i < block_keys * dim; i += blockDim.x) {
    const int k = i / dim, d = i % dim;
    to[k * (dim + 1) + d] = k < n ? from[(u64)k * stride + d] : 0.0f;
  }
}

// Products of four rows of `a` (`[·, dim]`) with one of `b` (`[·, dim + 1]`).
__device__ void four_dots(float* out, const float* a, const float* b, int dim) {
  float x = 0.0f, y = 0.0f, z = 0.0f, w = 0.0f;
  for (int d = 0; d < dim; d++) {
    const float value = b[d];
    x += a[d] * value;
    y += a[dim + d] * value;
    z += a[2 * dim + d] * value;
    w += a[3 * dim + d] * value;
  }
  out[0] = x;
  out[1] = y;
  out[2] = z;
  out[3] = w;
}

// `log_sums` is `[rows, heads]`. Online softmax (Milakov and Gimelshein 2018), as in
// FlashAttention. Shared: see `attention.rs`, which chooses `block_rows` (a multiple of 4) and
// `block_keys`.
extern "C" __global__ void attention(float* out, float* log_sums, const float* q, const int* runs,
                                     const int* tiles, const u64* segments, int layer, int heads,
                                     int kv_heads, int dim, int window, float scale,
                                     int block_rows, int block_keys) {
  SHARED(shared);
  float* qs = shared;
  float* os = qs + block_rows * dim;
  float* kv = os + block_rows * dim;
  float* ps = kv + block_keys * (dim + 1);
  float* most = ps + block_rows * block_keys;
  float* sum = most + block_rows;
  float* shrink = sum + block_rows;
  const int t = threadIdx.x, threads = blockDim.x;
  const Tile tile = tile_of(runs, tiles, segments, heads, kv_heads, block_rows);
  load_pairs(qs, q, tile, heads, dim, block_rows, scale);
  for (int i = t; i < block_rows * dim; i += threads) os[i] = 0.0f;
  for (int r = t; r < block_rows; r += threads) {
    most[r] = UNSEEN;
    sum[r] = 0.0f;
  }
  const int last = end_of(tile, tile.count - 1);
  const int begin = window == 0 ? 0 : end_of(tile, 0) - window;
  const int stride = kv_heads * dim;
  int column = 0;
  for (int s = tile.from; s < tile.to; s++) {
    const u64 offset = layer * segments[4 * s + 2] + blockIdx.y * dim;
    const float* keys = (const float*)segments[4 * s] + offset;
    const float* values = (const float*)segments[4 * s + 1] + offset;
    const int len = (int)segments[4 * s + 3];
    for (int k0 = 0; k0 < len; k0 += block_keys) {
      const int n = len - k0 < block_keys ? len - k0 : block_keys;
      const int first = column + k0;
      if (first >= last || first + n <= begin) continue;
      __syncthreads();
      load_rows(kv, keys + (u64)k0 * stride, n, dim, stride, block_keys);
      __syncthreads();
      for (int i = t; i < block_rows / 4 * block_keys; i += threads) {
        const int k = i % block_keys, r = i / block_keys * 4;
        float dots[4];
        four_dots(dots, qs + r * dim, kv + k * (dim + 1), dim);
        for (int j = 0; j < 4; j++)
          ps[(r + j) * block_keys + k] =
              k < n && seen(tile, r + j, first + k, window) ? dots[j] : UNSEEN;
      }
      __syncthreads();
      for (int r = t; r < block_rows; r += threads) {
        float top = most[r];
        for (int k = 0; k < block_keys; k++) {
          const float p = ps[r * block_keys + k];
          top = p > top ? p : top;
        }
        shrink[r] = most[r] <= UNSEEN ? 0.0f : expf(most[r] - top);
        most[r] = top;
      }
      load_rows(kv, values + (u64)k0 * stride, n, dim, stride, block_keys);
      __syncthreads();
      for (int i = t; i < block_rows * block_keys; i += threads) {
        const float p = ps[i];
        ps[i] = p <= UNSEEN ? 0.0f : expf(p - most[i / block_keys]);
      }
      __syncthreads();
      for (int r = t; r < block_rows; r += threads) {
        float more = 0.0f;
        for (int k = 0; k < block_keys; k++) more += ps[r * block_keys + k];
        sum[r] = sum[r] * shrink[r] + more;
      }
      for (int i = t; i < block_rows / 4 * dim; i += threads) {
        const int d = i % dim, r = i / dim * 4;
        float x = 0.0f, y = 0.0f, z = 0.0f, w = 0.0f;
        const float* p = ps + r * block_keys;
        for (int k = 0; k < block_keys; k++) {
          const float value = kv[k * (dim + 1) + d];
          x += p[k] * value;
          y += p[block_keys + k] * value;
          z += p[2 * block_keys + k] * value;
          w += p[3 * block_keys + k] * value;
        }
        float* o = os + r * dim + d;
        o[0] = o[0] * shrink[r] + x;
        o[dim] = o[dim] * shrink[r + 1] + y;
        o[2 * dim] = o[2 * dim] * shrink[r + 2] + z;
        o[3 * dim] = o[3 * dim] * shrink[r + 3] + w;
      }
    }
    column += len;
  }
  __syncthreads();
  for (int i = t; i < tile.count * dim; i += threads) {
    const int r = i / dim;
    out[pair_at(tile, r, heads, dim) + i % dim] = os[i] / sum[r];
  }
  for (int r = t; r < tile.count; r += threads)
    log_sums[pair_at(tile, r, heads, 1)] = most[r] + logf(sum[r]);
}

// `dots = Σ out · d_out` of every head of every row: the same as Σ p · dp of its softmax row.
extern "C" __global__ void attention_dots(float* dots, const float* out, const float* d_out,
                                          u64 n, int dim) {
  for (u64 i = place(); i < n; i += places()) {
    float sum = 0.0f;
    for (int d = 0; d < dim; d++) sum += out[i * dim + d] * d_out[i * dim + d];
    dots[i] = sum;
  }
}

// The gradient of the queries; tiles as in the forward pass.
extern "C" __global__ void attention_backward_q(float* dq, const float* q, const float* d_out,
                                                const float* log_sums, const float* dots,
                                                const int* runs, const int* tiles,
                                                const u64* segments, int layer, int heads,
                                                int kv_heads, int dim, int window, float scale,
                                                int block_rows, int block_keys) {
  SHARED(shared);
  float* qs = shared;
  float* ds = qs + block_rows * dim;
  float* os = ds + block_rows * dim;
  float* ks = os + block_rows * dim;
  float* vs = ks + block_keys * (dim + 1);
  float* ps = vs + block_keys * (dim + 1);
  const int t = threadIdx.x, threads = blockDim.x;
  const Tile tile = tile_of(runs, tiles, segments, heads, kv_heads, block_rows);
  load_pairs(qs, q, tile, heads, dim, block_rows, scale);
  load_pairs(ds, d_out, tile, heads, dim, block_rows, 1.0f);
  for (int i = t; i < block_rows * dim; i += threads) os[i] = 0.0f;
  const int last = end_of(tile, tile.count - 1);
  const int begin = window == 0 ? 0 : end_of(tile, 0) - window;
  const int stride = kv_heads * dim;
  int column = 0;
  for (int s = tile.from; s < tile.to; s++) {
    const u64 offset = layer * segments[4 * s + 2] + blockIdx.y * dim;
    const float* keys = (const float*)segments[4 * s] + offset;
    const float* values = (const float*)segments[4 * s + 1] + offset;
    const int len = (int)segments[4 * s + 3];
    for (int k0 = 0; k0 < len; k0 += block_keys) {
      const int n = len - k0 < block_keys ? len - k0 : block_keys;
      const int first = column + k0;
      if (first >= last || first + n <= begin) continue;
      __syncthreads();
      load_rows(ks, keys + (u64)k0 * stride, n, dim, stride, block_keys);
      load_rows(vs, values + (u64)k0 * stride, n, dim, stride, block_keys);
      __syncthreads();
      for (int i = t; i < block_rows / 4 * block_keys; i += threads) {
        const int k = i % block_keys, r = i / block_keys * 4;
        float scores[4], dps[4];
        four_dots(scores, qs + r * dim, ks + k * (dim + 1), dim);
        four_dots(dps, ds + r * dim, vs + k * (dim + 1), dim);
        for (int j = 0; j < 4; j++) {
          float d = 0.0f;
          if (k < n && seen(tile, r + j, first + k, window)) {
            const u64 at = pair_at(tile, r + j, heads, 1);
            d = expf(scores[j] - log_sums[at]) * (dps[j] - dots[at]) * scale;
          }
          ps[(r + j) * block_keys + k] = d;
        }
      }
      __syncthreads();
      for (int i = t; i < block_rows / 4 * dim; i += threads) {
        const int d = i % dim, r = i / dim * 4;
        float x = 0.0f, y = 0.0f, z = 0.0f, w = 0.0f;
        const float* p = ps + r * block_keys;
        for (int k = 0; k < block_keys; k++) {
          const float value = ks[k * (dim + 1) + d];
          x += p[k] * value;
          y += p[block_keys + k] * value;
          z += p[2 * block_keys + k] * value;
          w += p[3 * block_keys + k] * value;
        }
        float* o = os + r * dim + d;
        o[0] += x;
        o[dim] += y;
        o[2 * dim] += z;
        o[3 * dim] += w;
      }
    }
    column += len;
  }
  __syncthreads();
  for (int i = t; i < tile.count * dim; i += threads) {
    const int r = i / dim;
    dq[pair_at(tile, r, heads, dim) + i % dim] = os[i];
  }
}

// The gradients of keys and values. A block takes one key head and at most `block_keys` (a
// multiple of 4) neighbouring keys of the pass; the rows from the key on up to `end` see a key,
// as far as the window reaches.
//
// key_tiles: first key, keys, end of the rows that see them
extern "C" __global__ void attention_backward_kv(float* dk, float* dv, const float* q,
                                                 const float* k, const float* v,
                                                 const float* d_out, const float* log_sums,
                                                 const float* dots, const u32* positions,
                                                 const int* key_tiles, int heads, int kv_heads,
                                                 int dim, int window, float scale, int block_rows,
                                                 int block_keys) {
  SHARED(shared);
  float* ks = shared;
  float* vs = ks + block_keys * (dim + 1);
  float* dks = vs + block_keys * (dim + 1);
  float* dvs = dks + block_keys * dim;
  float* qs = dvs + block_keys * dim;
  float* ds = qs + block_rows * dim;
  float* ps = ds + block_rows * dim;
  float* ss = ps + block_rows * block_keys;
  const int t = threadIdx.x, threads = blockDim.x;
  const int first = key_tiles[3 * blockIdx.x], n = key_tiles[3 * blockIdx.x + 1];
  const int stride = kv_heads * dim;
  const u64 start = (u64)first * stride + blockIdx.y * dim;
  load_rows(ks, k + start, n, dim, stride, block_keys);
  load_rows(vs, v + start, n, dim, stride, block_keys);
  for (int i = t; i < block_keys * dim; i += threads) dks[i] = dvs[i] = 0.0f;
  Tile tile;
  tile.row = first;
  tile.rows = key_tiles[3 * blockIdx.x + 2] - first;
  tile.group = heads / kv_heads;
  const int pairs = tile.rows * tile.group;
  for (tile.first = 0; tile.first < pairs; tile.first += block_rows) {
    tile.count = pairs - tile.first < block_rows ? pairs - tile.first : block_rows;
    __syncthreads();
    load_pairs(qs, q, tile, heads, dim, block_rows, 1.0f);
    load_pairs(ds, d_out, tile, heads, dim, block_rows, 1.0f);
    __syncthreads();
    for (int i = t; i < block_rows / 4 * block_keys; i += threads) {
      const int key = i % block_keys, r = i / block_keys * 4;
      float scores[4], dps[4];
      four_dots(scores, qs + r * dim, ks + key * (dim + 1), dim);
      four_dots(dps, ds + r * dim, vs + key * (dim + 1), dim);
      for (int j = 0; j < 4; j++) {
        const int row = first + (tile.first + r + j) / tile.group, column = first + key;
        float p = 0.0f, d = 0.0f;
        if (key < n && r + j < tile.count && row >= column &&
            (window == 0 || positions[row] - positions[column] < (u32)window)) {
          const u64 at = pair_at(tile, r + j, heads, 1);
          p = expf(scores[j] * scale - log_sums[at]);
          d = p * (dps[j] - dots[at]) * scale;
        }
        ps[(r + j) * block_keys + key] = p;
        ss[(r + j) * block_keys + key] = d;
      }
    }
    __syncthreads();
    for (int i = t; i < block_keys / 4 * dim; i += threads) {
      const int d = i % dim, key = i / dim * 4;
      float a[4] = {0.0f, 0.0f, 0.0f, 0.0f}, b[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int r = 0; r < tile.count; r++) {
        const float query = qs[r * dim + d], gradient = ds[r * dim + d];
        for (int j = 0; j < 4; j++) {
          a[j] += ss[r * block_keys + key + j] * query;
          b[j] += ps[r * block_keys + key + j] * gradient;
        }
      }
      for (int j = 0; j < 4; j++) {
        dks[(key + j) * dim + d] += a[j];
        dvs[(key + j) * dim + d] += b[j];
      }
    }
  }
  __syncthreads();
  for (int i = t; i < n * dim; i += threads) {
    const u64 at = start + (u64)(i / dim) * stride + i % dim;
    dk[at] = dks[i];
    dv[at] = dvs[i];
  }
}
