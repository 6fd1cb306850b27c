/* The loops over votes that are paid for each of them: reading those of a CastVotesRequest that are plain (one known
 * option, a voter id in printable ASCII), parting ballots by ranges of their keys, and putting them in order.
 *
 * The first reads the request as it came from the network, without a Python object for each vote, hashes the voters and
 * makes the ballots that command_server/ballots.py describes. Whatever is not plain is left to the Python code, which
 * knows all the rules; so nothing is ever refused here, and without this module everything works, more slowly.
 *
 * Protobuf's wire format: https://protobuf.dev/programming-guides/encoding. BLAKE2b: RFC 7693.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define KEY_BYTES 16
#define BLOCK_BYTES 128
#define MAX_VOTER_ID_BYTES 256
#define PERSON_BYTES 16
/* What a keyed ballot ends with: a length of 4 bytes, and that many bytes of the hash of the voter and the idempotency key. */
#define HASH_BYTES 7
#define MAX_IDEMPOTENCY_KEY_BYTES 64
/* Options whose marking is at hand without a look into the dict. */
#define REMEMBERED 8

/* ---- BLAKE2b ---- */

static const uint64_t IV[8] = {
    0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
    0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179,
};

static const uint8_t SIGMA[12][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
};

static uint64_t load64(const uint8_t *at) {
    uint64_t word = 0;
    for (int i = 7; i >= 0; i--)
        word = word << 8 | at[i];
    return word;
}

static uint64_t rotate(uint64_t word, int bits) { return word >> bits | word << (64 - bits); }

#define MIX(a, b, c, d, x, y)               \
    do {                                    \
        v[a] += v[b] + (x);                 \
        v[d] = rotate(v[d] ^ v[a], 32);     \
        v[c] += v[d];                       \
        v[b] = rotate(v[b] ^ v[c], 24);     \
        v[a] += v[b] + (y);                 \
        v[d] = rotate(v[d] ^ v[a], 16);     \
        v[c] += v[d];                       \
        v[b] = rotate(v[b] ^ v[c], 63);     \
    } while (0)

#define ROUND(r)                                                   \
    do {                                                           \
        MIX(0, 4, 8, 12, m[SIGMA[r][0]], m[SIGMA[r][1]]);          \
        MIX(1, 5, 9, 13, m[SIGMA[r][2]], m[SIGMA[r][3]]);          \
        MIX(2, 6, 10, 14, m[SIGMA[r][4]], m[SIGMA[r][5]]);         \
        MIX(3, 7, 11, 15, m[SIGMA[r][6]], m[SIGMA[r][7]]);         \
        MIX(0, 5, 10, 15, m[SIGMA[r][8]], m[SIGMA[r][9]]);         \
        MIX(1, 6, 11, 12, m[SIGMA[r][10]], m[SIGMA[r][11]]);       \
        MIX(2, 7, 8, 13, m[SIGMA[r][12]], m[SIGMA[r][13]]);        \
        MIX(3, 4, 9, 14, m[SIGMA[r][14]], m[SIGMA[r][15]]);        \
    } while (0)

/* `hashed` counts the bytes up to the end of this block. */
static void compress(uint64_t h[8], const uint8_t block[BLOCK_BYTES], uint64_t hashed, int last) {
    uint64_t v[16], m[16];
    memcpy(v, h, 8 * sizeof *v);
    memcpy(v + 8, IV, sizeof IV);
    v[12] ^= hashed;
    if (last)
        v[14] = ~v[14];
    for (int i = 0; i < 16; i++)
        m[i] = load64(block + 8 * i);
    /* Unrolled: with constant places in SIGMA the words of the message are addressed directly. */
    ROUND(0); ROUND(1); ROUND(2); ROUND(3); ROUND(4); ROUND(5);
    ROUND(6); ROUND(7); ROUND(8); ROUND(9); ROUND(10); ROUND(11);
    for (int i = 0; i < 8; i++)
        h[i] ^= v[i] ^ v[i + 8];
}

/* The first 16 bytes of the hash of `size` >= 1 bytes, from a state that has taken in the key. */
static void hash(const uint64_t keyed[8], const uint8_t *data, Py_ssize_t size, uint8_t digest[KEY_BYTES]) {
    uint64_t h[8], hashed = BLOCK_BYTES;
    uint8_t block[BLOCK_BYTES];
    memcpy(h, keyed, sizeof h);
    for (; size > BLOCK_BYTES; data += BLOCK_BYTES, size -= BLOCK_BYTES)
        compress(h, data, hashed += BLOCK_BYTES, 0);
    memset(block, 0, sizeof block);
    memcpy(block, data, size);
    compress(h, block, hashed + size, 1);
    for (int i = 0; i < KEY_BYTES; i++)
        digest[i] = (uint8_t)(h[i / 8] >> 8 * (i % 8));
}

/* ---- the wire format ---- */

typedef struct {
    const uint8_t *at, *end;
} Span;

/* A number; fails where it is not all there, or has more than 64 bits. */
static int take_number(Span *from, uint64_t *number) {
    *number = 0;
    for (int shift = 0; shift < 64 && from->at < from->end; shift += 7) {
        uint8_t byte = *from->at++;
        if (shift == 63 && byte > 1)
            return 0;
        *number |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80)
            return 1;
    }
    return 0;
}

/* What follows its own length; protobuf takes no length of more than 5 bytes. */
static int take_span(Span *from, Span *span) {
    const uint8_t *length = from->at;
    uint64_t size;
    if (!take_number(from, &size) || from->at - length > 5 || size > (uint64_t)(from->end - from->at))
        return 0;
    span->at = from->at;
    span->end = from->at += size;
    return 1;
}

static Py_ssize_t size_of(Span span) { return span.end - span.at; }

static int is_ascii(Span text) {
    uint8_t bits = 0;
    while (text.at < text.end)
        bits |= *text.at++;
    return bits < 0x80;
}

/* Whether contracts/text.py takes this for a voter id of ASCII alone: 1 to 256 printable characters, none of those at the
 * ends a space. All bytes are looked at, without a branch: the compiler does 16 of them at a time. */
static int is_plain_voter(Span text) {
    uint8_t others = 0;
    if (size_of(text) < 1 || size_of(text) > MAX_VOTER_ID_BYTES || text.at[0] == ' ' || text.end[-1] == ' ')
        return 0;
    while (text.at < text.end)
        others |= (uint8_t)(*text.at++ - 0x20) > 0x7e - 0x20;
    return !others;
}

/* Field numbers and wire types: tally.command.v1.CastVotesRequest and Vote. */
enum { BATCH_SEQUENCE = 1 << 3 | 0, POLL_ID = 2 << 3 | 2, VOTES = 3 << 3 | 2, IDEMPOTENCY_KEY = 4 << 3 | 2 };
enum { VOTER_ID = 1 << 3 | 2, OPTION_IDS = 2 << 3 | 2 };

/* Whether a vote has one voter and one option, and no more; which option that is, is for the caller to see. */
static int plain_vote(Span vote, Span *voter, Span *option) {
    int voters = 0, options = 0;
    while (vote.at < vote.end) {
        uint8_t tag = *vote.at++;
        if (tag == VOTER_ID && !voters++ && take_span(&vote, voter))
            continue;
        if (tag == OPTION_IDS && !options++ && take_span(&vote, option))
            continue;
        return 0;
    }
    return voters && options && is_plain_voter(*voter);
}

/* ---- the functions ---- */

PyDoc_STRVAR(envelope_doc,
"envelope(request: bytes) -> tuple[int, str, int, str] | None\n\n"
"batch_sequence, poll_id, the number of votes and idempotency_key of a serialized CastVotesRequest; None where it has\n"
"anything else in it or cannot be read. Whether the votes can be read, is not known yet.");

static PyObject *envelope(PyObject *module, PyObject *request) {
    (void)module;
    if (!PyBytes_Check(request))
        return PyErr_Format(PyExc_TypeError, "the request must be bytes");
    const uint8_t *data = (const uint8_t *)PyBytes_AS_STRING(request);
    Span rest = {data, data + PyBytes_GET_SIZE(request)}, poll_id = {data, data}, key = {data, data}, vote;
    uint64_t sequence = 0;
    Py_ssize_t votes = 0;
    /* A text that comes twice is left to protobuf: the last one counts, but each has to be valid. */
    int poll_ids = 0, keys = 0;
    while (rest.at < rest.end) {
        uint8_t tag = *rest.at++;
        if (tag == VOTES && take_span(&rest, &vote))
            votes++;
        else if (!(tag == POLL_ID && !poll_ids++ && take_span(&rest, &poll_id))
                 && !(tag == BATCH_SEQUENCE && take_number(&rest, &sequence))
                 && !(tag == IDEMPOTENCY_KEY && !keys++ && take_span(&rest, &key)))
            Py_RETURN_NONE;
    }
    if (!is_ascii(poll_id) || !is_ascii(key) || size_of(key) > MAX_IDEMPOTENCY_KEY_BYTES)
        Py_RETURN_NONE;
    return Py_BuildValue("Ls#ns#", (long long)sequence, (const char *)poll_id.at, size_of(poll_id), votes,
                         (const char *)key.at, size_of(key));
}

typedef struct {
    Span option;
    PyObject *marking;
} Marking;

/* The marking of an option, borrowed; NULL where the poll has no such option, or with an error set. */
static PyObject *marking_of(Span option, PyObject *markings, Marking *remembered, int *count) {
    for (int i = 0; i < *count; i++)
        if (size_of(remembered[i].option) == size_of(option)
            && memcmp(remembered[i].option.at, option.at, size_of(option)) == 0)
            return remembered[i].marking;
    PyObject *option_id = PyUnicode_DecodeUTF8((const char *)option.at, size_of(option), NULL);
    if (option_id == NULL) {
        if (PyErr_ExceptionMatches(PyExc_UnicodeDecodeError))
            PyErr_Clear();
        return NULL;
    }
    PyObject *marking = PyDict_GetItemWithError(markings, option_id);
    Py_DECREF(option_id);
    if (marking != NULL && !PyBytes_Check(marking))
        return PyErr_Format(PyExc_TypeError, "a marking must be bytes");
    if (marking != NULL && *count < REMEMBERED)
        remembered[(*count)++] = (Marking){option, marking};
    return marking;
}

PyDoc_STRVAR(mark_doc,
"mark(request: bytes, voters: bytes, markings: dict[str, bytes], hashes: bytes, idempotency_key: bytes)\n"
"    -> list[bytes | None]\n\n"
"The ballot of each vote of a request that `envelope` could read; None for a vote that is not plain. `voters` and `hashes`\n"
"are what `keyed` returned for either hash, `markings` is option_id -> the choices in a ballot for it. Where the\n"
"idempotency_key, of up to 64 bytes, is not empty the ballots are keyed ones.");

static PyObject *mark(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    (void)module;
    if (count != 5 || !PyBytes_Check(arguments[0]) || !PyBytes_Check(arguments[1]) || !PyDict_Check(arguments[2])
        || !PyBytes_Check(arguments[3]) || !PyBytes_Check(arguments[4]))
        return PyErr_Format(PyExc_TypeError, "mark takes bytes, bytes, a dict, bytes and bytes");
    uint64_t keyed[8], hashes[8];
    if (PyBytes_GET_SIZE(arguments[1]) != sizeof keyed || PyBytes_GET_SIZE(arguments[3]) != sizeof hashes)
        return PyErr_Format(PyExc_ValueError, "the second and the fourth argument must come from keyed()");
    memcpy(keyed, PyBytes_AS_STRING(arguments[1]), sizeof keyed);
    memcpy(hashes, PyBytes_AS_STRING(arguments[3]), sizeof hashes);
    Py_ssize_t key_size = PyBytes_GET_SIZE(arguments[4]), suffix = key_size ? 4 + HASH_BYTES : 0;
    if (key_size > MAX_IDEMPOTENCY_KEY_BYTES)
        return PyErr_Format(PyExc_ValueError, "an idempotency key has up to %d bytes", MAX_IDEMPOTENCY_KEY_BYTES);
    /* The voter's key and the idempotency key, and their hash. */
    uint8_t both[KEY_BYTES + MAX_IDEMPOTENCY_KEY_BYTES], digest[KEY_BYTES];
    memcpy(both + KEY_BYTES, PyBytes_AS_STRING(arguments[4]), key_size);
    const uint8_t *data = (const uint8_t *)PyBytes_AS_STRING(arguments[0]);
    Span rest = {data, data + PyBytes_GET_SIZE(arguments[0])}, span, voter = {data, data}, option = {data, data};
    Marking remembered[REMEMBERED];
    int known = 0;
    uint64_t number;
    PyObject *ballots = PyList_New(0);
    while (ballots != NULL && rest.at < rest.end) {
        uint8_t tag = *rest.at++;
        if (tag == BATCH_SEQUENCE ? !take_number(&rest, &number) : !take_span(&rest, &span)) {
            PyErr_SetString(PyExc_ValueError, "not a request that envelope() could read");
            goto failed;
        }
        if (tag != VOTES)
            continue;
        PyObject *ballot = NULL, *marking = NULL;
        if (plain_vote(span, &voter, &option)) {
            marking = marking_of(option, arguments[2], remembered, &known);
            if (marking == NULL && PyErr_Occurred())
                goto failed;
        }
        if (marking == NULL) {
            ballot = Py_NewRef(Py_None);
        } else {
            Py_ssize_t size = PyBytes_GET_SIZE(marking);
            ballot = PyBytes_FromStringAndSize(NULL, KEY_BYTES + size + suffix);
            if (ballot == NULL)
                goto failed;
            uint8_t *bytes = (uint8_t *)PyBytes_AS_STRING(ballot);
            hash(keyed, voter.at, size_of(voter), bytes);
            memcpy(bytes + KEY_BYTES, PyBytes_AS_STRING(marking), size);
            if (suffix) {
                memcpy(both, bytes, KEY_BYTES);
                hash(hashes, both, KEY_BYTES + key_size, digest);
                memcpy(bytes + KEY_BYTES + size, (const uint8_t[4]){0, 0, 0, HASH_BYTES}, 4);
                memcpy(bytes + KEY_BYTES + size + 4, digest, HASH_BYTES);
            }
        }
        int appended = PyList_Append(ballots, ballot);
        Py_DECREF(ballot);
        if (appended < 0)
            goto failed;
    }
    return ballots;
failed:
    Py_XDECREF(ballots);
    return NULL;
}

PyDoc_STRVAR(keyed_doc,
"keyed(key: bytes, person: bytes) -> bytes\n\n"
"The state of BLAKE2b with a digest of 16 bytes after it has taken in the key (1 to 64 bytes) and the personalization (up\n"
"to 16), as `mark` wants it.");

static PyObject *keyed(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    (void)module;
    if (count != 2 || !PyBytes_Check(arguments[0]) || !PyBytes_Check(arguments[1]))
        return PyErr_Format(PyExc_TypeError, "keyed takes two bytes");
    Py_ssize_t key = PyBytes_GET_SIZE(arguments[0]), person = PyBytes_GET_SIZE(arguments[1]);
    if (key < 1 || key > 64 || person > PERSON_BYTES)
        return PyErr_Format(PyExc_ValueError, "a key has 1 to 64 bytes, a personalization up to 16");
    /* RFC 7693, section 2.5: sizes of digest and key, fanout and depth 1; the personalization is the last 16 bytes. */
    uint8_t parameters[64] = {KEY_BYTES, (uint8_t)key, 1, 1}, block[BLOCK_BYTES] = {0};
    memcpy(parameters + 64 - PERSON_BYTES, PyBytes_AS_STRING(arguments[1]), person);
    memcpy(block, PyBytes_AS_STRING(arguments[0]), key);
    uint64_t h[8];
    for (int i = 0; i < 8; i++)
        h[i] = IV[i] ^ load64(parameters + 8 * i);
    compress(h, block, BLOCK_BYTES, 0);
    return PyBytes_FromStringAndSize((const char *)h, sizeof h);
}

/* ---- Ranges and order ---- */

/* The ballots of a list, each at least as long as a key; NULL and an exception where it holds anything else. */
static PyObject **ballots_of(PyObject *list) {
    if (!PyList_Check(list))
        return (PyObject **)PyErr_Format(PyExc_TypeError, "ballots come in a list");
    PyObject **ballots = ((PyListObject *)list)->ob_item;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++)
        if (!PyBytes_Check(ballots[i]) || PyBytes_GET_SIZE(ballots[i]) < KEY_BYTES)
            return (PyObject **)PyErr_Format(PyExc_TypeError, "a ballot has at least %d bytes", KEY_BYTES);
    return ballots;
}

PyDoc_STRVAR(by_range_doc,
"by_range(ballots: list[bytes], ranges: int) -> list[list[bytes]]\n\n"
"The ballots in each of so many (1 to 256) equal ranges of their first bytes; within a range they stay in their order.");

static PyObject *by_range(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    (void)module;
    long ranges = count == 2 ? PyLong_AsLong(arguments[1]) : 0;
    if (ranges < 1 || ranges > 256)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "by_range takes a list and 1 to 256");
    PyObject **ballots = ballots_of(arguments[0]);
    if (PyErr_Occurred())
        return NULL;
    Py_ssize_t number = PyList_GET_SIZE(arguments[0]), sizes[256] = {0}, filled[256] = {0};
#define RANGE_OF(ballot) ((uint8_t)PyBytes_AS_STRING(ballot)[0] * ranges / 256)
    for (Py_ssize_t i = 0; i < number; i++)
        sizes[RANGE_OF(ballots[i])]++;
    PyObject *parted = PyList_New(ranges);
    for (long range = 0; parted != NULL && range < ranges; range++) {
        PyObject *part = PyList_New(sizes[range]);
        if (part == NULL)
            Py_CLEAR(parted);
        else
            PyList_SET_ITEM(parted, range, part);
    }
    for (Py_ssize_t i = 0; parted != NULL && i < number; i++) {
        long range = RANGE_OF(ballots[i]);
        PyList_SET_ITEM(PyList_GET_ITEM(parted, range), filled[range]++, Py_NewRef(ballots[i]));
    }
#undef RANGE_OF
    return parted;
}

#define SORTED_BYTES 8

typedef struct {
    uint8_t key[SORTED_BYTES];
    PyObject *ballot;
} Sortable;

PyDoc_STRVAR(in_order_doc,
"in_order(ballots: list[bytes]) -> list[bytes]\n\n"
"The ballots by the first 8 bytes of their keys; those that agree in them stay in their order.");

/* A radix sort: for each byte of the key, from the last to the first, a stable pass over all ballots. */
static PyObject *in_order(PyObject *module, PyObject *list) {
    (void)module;
    PyObject **ballots = ballots_of(list);
    if (PyErr_Occurred())
        return NULL;
    Py_ssize_t number = PyList_GET_SIZE(list);
    Sortable *items = PyMem_Malloc((2 * number + 1) * sizeof *items);
    PyObject *ordered = items != NULL ? PyList_New(number) : PyErr_NoMemory();
    if (ordered == NULL) {
        PyMem_Free(items);
        return NULL;
    }
    Sortable *from = items, *to = items + number;
    Py_ssize_t places[SORTED_BYTES][256] = {{0}};
    for (Py_ssize_t i = 0; i < number; i++) {
        const uint8_t *key = (const uint8_t *)PyBytes_AS_STRING(ballots[i]);
        from[i] = (Sortable){.ballot = ballots[i]};
        for (int digit = 0; digit < SORTED_BYTES; digit++) {
            from[i].key[digit] = key[digit];
            places[digit][key[digit]]++;
        }
    }
    for (int digit = SORTED_BYTES - 1; digit >= 0; digit--) {
        Py_ssize_t place = 0, same;
        for (int value = 0; value < 256; value++, place += same) {
            same = places[digit][value];
            places[digit][value] = place;
        }
        for (Py_ssize_t i = 0; i < number; i++)
            to[places[digit][from[i].key[digit]]++] = from[i];
        Sortable *swapped = from;
        from = to;
        to = swapped;
    }
    for (Py_ssize_t i = 0; i < number; i++)
        PyList_SET_ITEM(ordered, i, Py_NewRef(from[i].ballot));
    PyMem_Free(items);
    return ordered;
}

static PyMethodDef functions[] = {
    {"envelope", envelope, METH_O, envelope_doc},
    {"mark", (PyCFunction)(void (*)(void))mark, METH_FASTCALL, mark_doc},
    {"by_range", (PyCFunction)(void (*)(void))by_range, METH_FASTCALL, by_range_doc},
    {"in_order", in_order, METH_O, in_order_doc},
    {"keyed", (PyCFunction)(void (*)(void))keyed, METH_FASTCALL, keyed_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_ballots", "The loops over votes; see _ballots.c.", -1, functions, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__ballots(void) { return PyModule_Create(&definition); }
