// The recurrences as one would write them first: tokens outside, the state row by row in memory, inner loops left to the
// compiler's vectors. The way back keeps every token's state. float32, [tokens, heads, n] or [tokens, channels], one
// sequence; what benchmarks/recurrences.py compares the library's kernels with.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SUM(total, expression) \
  float total = 0;             \
  for (long i = 0; i < n; ++i) total += expression;

// y_t = S_t r_t with S_t = S_{t-1} diag(w) + (S_{t-1} a) bᵀ + v kᵀ; `states` keeps S_0 … S_T of a head, or is null.
static void head7(long tokens, long stride, long n, const float* r, const float* log_w, const float* k, const float* v,
                  const float* a, const float* b, float* state, float* y, float* states) {
  float w[n];
  for (long t = 0; t < tokens; ++t, r += stride, log_w += stride, k += stride, v += stride, a += stride, b += stride, y += stride) {
    if (states) memcpy(states + t * n * n, state, sizeof(float) * n * n);
    for (long i = 0; i < n; ++i) w[i] = expf(log_w[i]);
    for (long j = 0; j < n; ++j) {
      float* row = state + j * n;
      SUM(removed, row[i] * a[i])
      for (long i = 0; i < n; ++i) row[i] = row[i] * w[i] + removed * b[i] + v[j] * k[i];
      SUM(read, row[i] * r[i])
      y[j] = read;
    }
  }
  if (states) memcpy(states + tokens * n * n, state, sizeof(float) * n * n);
}

void wkv7_forward(long tokens, long heads, long n, const float* r, const float* log_w, const float* k, const float* v,
                  const float* a, const float* b, float* state, float* y) {
  for (long h = 0; h < heads; ++h)
    head7(tokens, heads * n, n, r + h * n, log_w + h * n, k + h * n, v + h * n, a + h * n, b + h * n,
          state + h * n * n, y + h * n, NULL);
}

void wkv7_train(long tokens, long heads, long n, const float* r, const float* log_w, const float* k, const float* v,
                const float* a, const float* b, float* state, float* y, const float* gy, float* gr, float* gw, float* gk,
                float* gv, float* ga, float* gb) {
  const long stride = heads * n;
  float* states = malloc(sizeof(float) * (tokens + 1) * n * n);
  float* g = malloc(sizeof(float) * n * n);
  float w[n];
  for (long h = 0; h < heads; ++h) {
    head7(tokens, stride, n, r + h * n, log_w + h * n, k + h * n, v + h * n, a + h * n, b + h * n, state + h * n * n,
          y + h * n, states);
    memset(g, 0, sizeof(float) * n * n);
    for (long t = tokens - 1; t >= 0; --t) {
      const long at = t * stride + h * n;
      const float *before = states + t * n * n, *after = before + n * n;
      for (long i = 0; i < n; ++i) {
        w[i] = expf(log_w[at + i]);
        gr[at + i] = gw[at + i] = gk[at + i] = ga[at + i] = gb[at + i] = 0;
      }
      for (long j = 0; j < n; ++j) {
        float* row = g + j * n;
        const float *s = before + j * n, dy = gy[at + j], vj = v[at + j];
        for (long i = 0; i < n; ++i) {
          gr[at + i] += dy * after[j * n + i];
          row[i] += dy * r[at + i];
          gk[at + i] += row[i] * vj;
          gw[at + i] += row[i] * s[i] * w[i];
        }
        SUM(value, row[i] * k[at + i])
        SUM(removed, s[i] * a[at + i])
        SUM(of_removed, row[i] * b[at + i])
        gv[at + j] = value;
        for (long i = 0; i < n; ++i) {
          gb[at + i] += row[i] * removed;
          ga[at + i] += of_removed * s[i];
          row[i] = row[i] * w[i] + of_removed * a[at + i];
        }
      }
    }
  }
  free(states);
  free(g);
}

// y_t = (S_{t-1} + diag(u k) v) r with S_t = S_{t-1} diag(w) + v kᵀ; decays are `w_stride` numbers apart, 0 in RWKV-5.
static void head6(long tokens, long stride, long n, const float* r, const float* log_w, long w_stride, const float* k,
                  const float* v, const float* u, float* state, float* y, float* states) {
  float w[n];
  for (long t = 0; t < tokens; ++t, r += stride, log_w += w_stride, k += stride, v += stride, y += stride) {
    if (states) memcpy(states + t * n * n, state, sizeof(float) * n * n);
    for (long i = 0; i < n; ++i) w[i] = expf(log_w[i]);
    SUM(now, u[i] * k[i] * r[i])
    for (long j = 0; j < n; ++j) {
      float* row = state + j * n;
      SUM(read, row[i] * r[i])
      y[j] = read + now * v[j];
      for (long i = 0; i < n; ++i) row[i] = row[i] * w[i] + v[j] * k[i];
    }
  }
}

void wkv6_forward(long tokens, long heads, long n, const float* r, const float* log_w, long w_stride, const float* k,
                  const float* v, const float* u, float* state, float* y) {
  for (long h = 0; h < heads; ++h)
    head6(tokens, heads * n, n, r + h * n, log_w + h * n, w_stride, k + h * n, v + h * n, u + h * n, state + h * n * n,
          y + h * n, NULL);
}

void wkv6_train(long tokens, long heads, long n, const float* r, const float* log_w, long w_stride, const float* k,
                const float* v, const float* u, float* state, float* y, const float* gy, float* gr, float* gw, float* gk,
                float* gv, float* gu) {
  const long stride = heads * n;
  float* states = malloc(sizeof(float) * tokens * n * n);
  float* g = malloc(sizeof(float) * n * n);
  float w[n];
  for (long h = 0; h < heads; ++h) {
    head6(tokens, stride, n, r + h * n, log_w + h * n, w_stride, k + h * n, v + h * n, u + h * n, state + h * n * n,
          y + h * n, states);
    memset(g, 0, sizeof(float) * n * n);
    for (long i = 0; i < n; ++i) gu[h * n + i] = 0;
    for (long t = tokens - 1; t >= 0; --t) {
      const long at = t * stride + h * n, of_w = t * w_stride + h * n;
      const float* before = states + t * n * n;
      SUM(values, gy[at + i] * v[at + i])
      SUM(now, u[h * n + i] * k[at + i] * r[at + i])
      for (long i = 0; i < n; ++i) {
        const float ui = u[h * n + i], ki = k[at + i], ri = r[at + i];
        w[i] = expf(log_w[of_w + i]);
        gr[at + i] = ui * ki * values;
        gk[at + i] = ui * ri * values;
        gu[h * n + i] += ki * ri * values;
        if (w_stride || t == tokens - 1) gw[of_w + i] = 0;
      }
      for (long j = 0; j < n; ++j) {
        float* row = g + j * n;
        const float *s = before + j * n, dy = gy[at + j], vj = v[at + j];
        SUM(value, row[i] * k[at + i])
        gv[at + j] = value + dy * now;
        for (long i = 0; i < n; ++i) {
          gr[at + i] += dy * s[i];
          gk[at + i] += row[i] * vj;
          gw[of_w + i] += row[i] * s[i] * w[i];
          row[i] = row[i] * w[i] + dy * r[at + i];
        }
      }
    }
  }
  free(states);
  free(g);
}

// y_t = (P + e^{u+k} v) / (Q + e^{u+k}), P and Q being sums of e^k v and e^k that decay by e^log_w, kept as multiples of
// e^top. state: [3, channels].
void wkv4_forward(long tokens, long channels, const float* log_w, const float* u, const float* k, const float* v,
                  float* state, float* y, float* states) {
  float *p = state, *q = state + channels, *top = state + 2 * channels;
  for (long t = 0; t < tokens; ++t, k += channels, v += channels, y += channels) {
    if (states) memcpy(states + t * 3 * channels, state, sizeof(float) * 3 * channels);
    for (long c = 0; c < channels; ++c) {
      float highest = fmaxf(top[c], u[c] + k[c]);
      float past = expf(top[c] - highest), now = expf(u[c] + k[c] - highest);
      y[c] = (past * p[c] + now * v[c]) / (past * q[c] + now);
      highest = fmaxf(top[c] + log_w[c], k[c]);
      past = expf(top[c] + log_w[c] - highest), now = expf(k[c] - highest);
      p[c] = past * p[c] + now * v[c];
      q[c] = past * q[c] + now;
      top[c] = highest;
    }
  }
}

void wkv4_train(long tokens, long channels, const float* log_w, const float* u, const float* k, const float* v,
                float* state, float* y, const float* gy, float* gw, float* gu, float* gk, float* gv) {
  float* states = malloc(sizeof(float) * tokens * 3 * channels);
  float* g = calloc(3 * channels, sizeof(float));
  float *gp = g, *gq = g + channels, *exponent = g + 2 * channels;
  for (long c = 0; c < channels; ++c) gw[c] = gu[c] = 0, exponent[c] = -1e38f;
  wkv4_forward(tokens, channels, log_w, u, k, v, state, y, states);
  for (long t = tokens - 1; t >= 0; --t) {
    const float *p = states + t * 3 * channels, *q = p + channels, *top = q + channels;
    for (long c = 0; c < channels; ++c) {
      const long at = t * channels + c;
      const float own = expf(k[at] + exponent[c]), old = expf(log_w[c] + top[c] + exponent[c]);
      const float highest = fmaxf(top[c], u[c] + k[at]);
      const float past = expf(top[c] - highest), now = expf(u[c] + k[at] - highest);
      const float share = gy[at] / (past * q[c] + now), of_now = share * now * (v[at] - y[at]);
      gv[at] = own * gp[c] + share * now;
      gk[at] = own * (gp[c] * v[at] + gq[c]) + of_now;
      gu[c] += of_now;
      gw[c] += old * (gp[c] * p[c] + gq[c] * q[c]);
      const float next = fmaxf(exponent[c] + log_w[c], -highest);
      const float kept = expf(exponent[c] + log_w[c] - next), added = expf(-highest - next);
      gp[c] = kept * gp[c] + added * share;
      gq[c] = kept * gq[c] - added * share * y[at];
      exponent[c] = next;
    }
  }
  free(states);
  free(g);
}
