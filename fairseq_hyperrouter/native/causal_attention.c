/* Causal self-attention without gradients: float32 on a CPU with AVX-512. models/causal_attention.py is what calls this.

   softmax(q k^T / sqrt(d)) v of one head of one sample, T queries and keys of width d:

   1. Copy the keys and the values, WIDE columns after WIDE columns (tiles.h).
   2. For TALL queries after the other: their products with the keys up to the last one's own, ...
   3. ... e to the power of these less the largest, in place, and nothing for keys after a query's own, ...
   4. ... and the products of that with the values, divided by its sum.

   So scores never leave the cache, and little is computed that the mask hides. Threads share heads and samples. */

#include "tiles.h"

enum { PART = TALL * ROW }; /* the scores of TALL queries and DEPTH keys */

/* e to the power of x <= 0, to 2 units in the last place: 2^n times the Taylor series of what is left of x, which is at
   most log(2) / 2. */
INLINE vector exponential(vector x)
{
    const vector lowest = (vector){0} - 87; /* e to that is the smallest number; NaN stays NaN */
    const lanes low = x < lowest;
    x = (vector)(((lanes)x & ~low) | ((lanes)lowest & low));
    const vector rounding = (vector){0} + 0x1.8p23f; /* makes the last bits of a sum a whole number */
    const vector shifted = x * 0x1.715476p+0f + rounding, n = shifted - rounding;
    x = x - n * 0x1.63p-1f - n * -0x1.bd0106p-13f; /* log(2) in two parts, the first of few bits */
    vector y = x * (1.f / 5040) + 1.f / 720;
    y = y * x + 1.f / 120;
    y = y * x + 1.f / 24;
    y = y * x + 1.f / 6;
    y = y * x + 0.5f;
    y = y * x + 1;
    y = y * x + 1;
    return y * (vector)(((lanes)shifted - 0x4b400000 + 127) << 23);
}

/* e to the power of n scores less the largest of them, and their sum. Those from *own* up to the next WIDE are hidden. */
INLINE float softmax(float *score, int64_t own, int64_t n)
{
    for (int64_t s = own; s < n; s++)
        score[s / DEPTH * PART + s % DEPTH] = -__builtin_inff();
    vector most = (vector){0} - __builtin_inff(), sum = {0};
    for (int64_t s = 0; s < n; s += LANES) {
        const vector x = *(const vector *)(score + s / DEPTH * PART + s % DEPTH);
        const lanes more = x > most;
        most = (vector)(((lanes)x & more) | ((lanes)most & ~more));
    }
    float largest = most[0], total = 0;
    for (int l = 1; l < LANES; l++)
        largest = most[l] > largest ? most[l] : largest;
    for (int64_t s = 0; s < n; s += LANES) {
        vector *at = (vector *)(score + s / DEPTH * PART + s % DEPTH);
        *at = exponential(*at - largest);
        if (s + LANES > own)
            for (int64_t l = own > s ? own - s : 0; l < LANES; l++)
                (*at)[l] = 0;
        sum += *at;
    }
    for (int l = 0; l < LANES; l++)
        total += sum[l];
    return total;
}

static int64_t room_for(int64_t T, int64_t d)
{
    const int64_t wide_T = (T + WIDE - 1) / WIDE * WIDE, wide_d = (d + WIDE - 1) / WIDE * WIDE;
    return wide_T * d + T * wide_d + ((wide_T + DEPTH - 1) / DEPTH + 1) * PART;
}

/* One head of one sample; a token's numbers lie *stride* from the next one's. */
AVX512 static void attend(const float *q, const float *k, const float *v, float *y, int64_t T, int64_t d,
                          int64_t stride, float *room)
{
    static const float zeros[WIDE] = {0};
    const matrix queries = {q, stride}, keys = {k, stride, 1}, values = {v, stride};
    float *const key = room, *const value = key + (T + WIDE - 1) / WIDE * WIDE * d;
    float *const query = value + (d + WIDE - 1) / WIDE * WIDE * T, *const score = query + PART;
    const float root = 1 / __builtin_sqrtf((float)d);
    copy_second(&keys, 0, d, 0, T, key, NULL);
    copy_second(&values, 0, T, 0, d, value, NULL);
    const int64_t tiles = (T + TALL - 1) / TALL;
    for (int64_t t = 0, i = 0; t < tiles; t++) {
        const int rows = (int)((T - i) / (tiles - t));
        const int64_t n = (i + rows + WIDE - 1) / WIDE * WIDE; /* keys up to the last query's own, and hidden ones */
        float *out[TALL], scale[TALL];
        copy_first(&queries, i, rows, 0, d, query);
        for (int r = 0; r < rows; r++)
            for (int64_t c = 0; c < d; c++)
                query[r * ROW + c] *= root;
        for (int64_t s = 0; s < n; s += WIDE) {
            for (int r = 0; r < rows; r++)
                out[r] = score + s / DEPTH * PART + r * ROW + s % DEPTH;
            tile_of(rows, 0, d, query, key + s * d, out, scale, zeros, 0);
        }
        for (int r = 0; r < rows; r++)
            scale[r] = 1 / softmax(score + r * ROW, i + r + 1, n);
        for (int64_t c = 0; c < d; c += WIDE) {
            const int64_t width = d - c < WIDE ? d - c : WIDE;
            float sum[TALL][WIDE] = {0};
            for (int r = 0; r < rows; r++)
                out[r] = sum[r];
            for (int64_t s = 0; s < i + rows; s += DEPTH)
                tile_of(rows, 0, i + rows - s < DEPTH ? i + rows - s : DEPTH, score + s / DEPTH * PART,
                        value + c * T + s * WIDE, out, scale, zeros, 1);
            for (int r = 0; r < rows; r++)
                memcpy(y + (i + r) * stride + c, sum[r], width * sizeof *y);
        }
        i += rows;
    }
}

PyDoc_STRVAR(attention_doc,
             "attention(q, k, v, y (T, N, d), room, T, N, d, threads)\n\n"
             "y = causal self-attention of N heads of samples; room has room(T, d) floats for each of the threads.");
static PyObject *attention(PyObject *self, PyObject *args)
{
    address q_at, k_at, v_at, y_at, room_at;
    Py_ssize_t T, N, d;
    int threads;
    if (!PyArg_ParseTuple(args, "KKKKKnnni", &q_at, &k_at, &v_at, &y_at, &room_at, &T, &N, &d, &threads))
        return NULL;
    const float *q = POINTER(float, q_at), *k = POINTER(float, k_at), *v = POINTER(float, v_at);
    float *y = POINTER(float, y_at), *room = POINTER(float, room_at);
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int thread = 0; thread < threads; thread++)
        for (Py_ssize_t n = N * thread / threads; n < N * (thread + 1) / threads; n++)
            attend(q + n * d, k + n * d, v + n * d, y + n * d, T, d, N * d, room + thread * room_for(T, d));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(room_doc, "room(T, d): how many floats a thread needs.");
static PyObject *room(PyObject *self, PyObject *args)
{
    Py_ssize_t T, d;
    if (!PyArg_ParseTuple(args, "nn", &T, &d))
        return NULL;
    return PyLong_FromLongLong(room_for(T, d));
}

static PyMethodDef methods[] = {
    {"attention", attention, METH_VARARGS, attention_doc},
    {"room", room, METH_VARARGS, room_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_causal_attention", "Causal attention; see causal_attention.py.", -1, methods,
};

PyMODINIT_FUNC PyInit__causal_attention(void)
{
    return module_of_tiles(&module);
}
