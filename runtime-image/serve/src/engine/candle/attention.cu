// Attention of one query head over a sequence whose keys and values lie in blocks. Compiled when the first model is loaded.
//
// A block of threads computes one query head of one row. Its warps share the tokens: a warp takes every fourth one, its lanes
// share the dimensions. Each keeps a running softmax; at the end the warps' parts are joined in order, so a row gets the same
// bits whatever else is in the batch.

#include <cuda_fp16.h>

#define LOWEST __int_as_float(0xff800000) /* minus infinity */
#define WARPS 4
#define MOST_PER_LANE 8 /* heads are at most 256 wide */

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ void attend(const float *queries, const T *keys, const T *values, const unsigned *tables, const unsigned *rows,
                       float *out, int heads, int kv_heads, int head_dim, int block_tokens, int table_len, int window,
                       float scale, float soft_cap) {
    const int head = blockIdx.x, row = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int kv_head = head / (heads / kv_heads);
    const unsigned *table = tables + (size_t)rows[2 * row] * table_len;
    const int len = rows[2 * row + 1];
    const int first = window > 0 && len > window ? len - window : 0;
    const float *query = queries + ((size_t)row * heads + head) * head_dim;

    float q[MOST_PER_LANE], mixed[MOST_PER_LANE];
    for (int i = 0; i < MOST_PER_LANE; i++) {
        const int d = lane + 32 * i;
        q[i] = d < head_dim ? query[d] * scale : 0.0f;
        mixed[i] = 0.0f;
    }
    float largest = LOWEST, sum = 0.0f;
    for (int token = first + warp; token < len; token += WARPS) {
        const size_t slot = (size_t)table[token / block_tokens] * block_tokens + token % block_tokens;
        const size_t at = (slot * kv_heads + kv_head) * head_dim;
        float score = 0.0f;
        for (int i = 0; i < MOST_PER_LANE; i++) {
            const int d = lane + 32 * i;
            if (d < head_dim) score += q[i] * to_float(keys[at + d]);
        }
        for (int step = 16; step > 0; step /= 2) score += __shfl_xor_sync(0xffffffff, score, step);
        if (soft_cap > 0.0f) score = soft_cap * tanhf(score / soft_cap);
        const float before = largest;
        largest = fmaxf(largest, score);
        const float keep = __expf(before - largest), weight = __expf(score - largest);
        sum = sum * keep + weight;
        for (int i = 0; i < MOST_PER_LANE; i++) {
            const int d = lane + 32 * i;
            if (d < head_dim) mixed[i] = mixed[i] * keep + weight * to_float(values[at + d]);
        }
    }

    __shared__ float warp_largest[WARPS], warp_sum[WARPS], warp_mixed[WARPS][32 * MOST_PER_LANE];
    if (lane == 0) {
        warp_largest[warp] = largest;
        warp_sum[warp] = sum;
    }
    for (int i = 0; i < MOST_PER_LANE; i++) warp_mixed[warp][lane + 32 * i] = mixed[i];
    __syncthreads();
    float all = LOWEST;
    for (int i = 0; i < WARPS; i++) all = fmaxf(all, warp_largest[i]);
    for (int d = threadIdx.x; d < head_dim; d += 32 * WARPS) {
        float total = 0.0f, value = 0.0f;
        for (int i = 0; i < WARPS; i++) {
            // A warp without a token has nothing, and its largest is minus infinity.
            const float share = warp_sum[i] > 0.0f ? __expf(warp_largest[i] - all) : 0.0f;
            total += warp_sum[i] * share;
            value += warp_mixed[i][d] * share;
        }
        out[((size_t)row * heads + head) * head_dim + d] = value / total;
    }
}

#define KERNEL(NAME, T)                                                                                                       \
    extern "C" __global__ void NAME(const float *queries, const T *keys, const T *values, const unsigned *tables,             \
                                    const unsigned *rows, float *out, int heads, int kv_heads, int head_dim,                  \
                                    int block_tokens, int table_len, int window, float scale, float soft_cap) {               \
        attend<T>(queries, keys, values, tables, rows, out, heads, kv_heads, head_dim, block_tokens, table_len, window,       \
                  scale, soft_cap);                                                                                           \
    }

KERNEL(paged_attention_f32, float)
KERNEL(paged_attention_f16, __half)
