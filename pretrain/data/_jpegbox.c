/* A box of a JPEG: its rows and columns are decoded, those above are only read over, those below not at all.
 *
 * The promise: what `decode` fills in is what decoding the whole file and cutting the box out would give, bit for bit,
 * and where it says no, nothing is known of the file and the caller decodes the whole of it. So it says no to all that is
 * rare (CMYK, odd sampling, arithmetic coding, headers that a reader may stumble over) and at the first warning.
 *
 * What lies below the box cannot make a file bad that was good up to there, if it holds nothing but coded data and
 * restart markers up to an end marker: whatever is wrong with that data, libjpeg warns of it and goes on, reads never
 * beyond the end marker, and alters no row above. `ends_well` looks for exactly this, without decoding. Where the header
 * has what Pillow, the judge of damaged files, may refuse, the rows below are read over to see whether it would be asked.
 *
 * Hostile input: every length is checked before it is used, libjpeg's errors and warnings come back here by longjmp,
 * nothing is printed, and memory is what libjpeg takes for a picture of at most MAX_PIXELS.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000 || JPEG_LIB_VERSION < 62
#error "libjpeg-turbo 2.1 or newer is needed: jpeg_crop_scanline and a jpeg_skip_scanlines without its early faults"
#endif

#define MAX_PIXELS (1u << 26) /* below Pillow's own limit, so that it has no say */
#define MAX_SEGMENTS 1000     /* a large colour profile takes 255 */
#define MARGIN 2              /* columns on either side: the upsampling filter looks at the next of half the width */

/* Markers, ITU-T T.81 table B.1. */
enum {
    SOF0 = 0xC0, SOF1 = 0xC1, SOF2 = 0xC2, DHT = 0xC4, RST0 = 0xD0, RST7 = 0xD7, SOI = 0xD8, EOI = 0xD9,
    SOS = 0xDA, DQT = 0xDB, DRI = 0xDD, APP0 = 0xE0, APP1 = 0xE1, APP2 = 0xE2, APP13 = 0xED, APP14 = 0xEE, APP15 = 0xEF,
    COM = 0xFE
};

/* simple: if the coded data is damaged, Pillow, which is asked then, reads at least the header. */
typedef struct {
    unsigned height, width, components;
    int simple;
} Frame;

typedef struct {
    unsigned top, left, height, width;
} Box;

static int begins(const unsigned char *payload, size_t size, const char *word, size_t length)
{
    return size >= length && memcmp(payload, word, length) == 0;
}

#define BEGINS(payload, size, word) begins(payload, size, word, sizeof(word) - 1)

/* Whether no reader can stumble over an APPn segment: Exif, several pictures, or too short for what it says it is. */
static int is_harmless(int marker, const unsigned char *payload, size_t size)
{
    if (marker == APP0)
        return !BEGINS(payload, size, "JFIF") || size >= 14;
    if (marker == APP1)
        return !BEGINS(payload, size, "Exif\0\0");
    if (marker == APP2)
        return !BEGINS(payload, size, "MPF\0") && (!BEGINS(payload, size, "ICC_PROFILE\0") || size >= 14);
    if (marker == APP13)
        return size < 6 || memcmp(payload + size - 6, "8BIM", 4) != 0;
    if (marker == APP14)
        return !BEGINS(payload, size, "Adobe") || size >= 12;
    return 1;
}

/* 8 bits, one component, or three of which the last two have the lowest sampling: the kinds whose pixels are tested. */
static int read_frame(const unsigned char *payload, size_t size, Frame *frame)
{
    if (size < 9 || payload[0] != 8)
        return 0;
    frame->height = payload[1] << 8 | payload[2];
    frame->width = payload[3] << 8 | payload[4];
    frame->components = payload[5];
    if (frame->height == 0 || frame->width == 0 || size != 6 + 3 * (size_t)frame->components)
        return 0;
    if (frame->components == 1)
        return payload[7] == 0x11;
    int sampling = payload[7];
    return frame->components == 3 && (sampling == 0x11 || sampling == 0x12 || sampling == 0x21 || sampling == 0x22) &&
           payload[10] == 0x11 && payload[13] == 0x11;
}

/* Whether the segments up to the first scan are plain ones, one after the other; fills in the frame. */
static int read_segments(const unsigned char *data, size_t size, Frame *frame)
{
    size_t at = 2;
    int known = 0;
    frame->simple = 1;
    if (size < 2 || data[0] != 0xFF || data[1] != SOI)
        return 0;
    for (int segment = 0; segment < MAX_SEGMENTS && size - at >= 4; segment++) {
        int marker = data[at + 1];
        size_t length = (size_t)data[at + 2] << 8 | data[at + 3];
        if (data[at] != 0xFF || length < 2 || length > size - at - 2)
            return 0;
        const unsigned char *payload = data + at + 4;
        if (marker == SOF0 || marker == SOF1 || marker == SOF2) {
            if (known || !read_frame(payload, length - 2, frame))
                return 0;
            known = 1;
        } else if (marker == SOS) {
            return known && frame->height * (size_t)frame->width <= MAX_PIXELS;
        } else if (marker >= APP0 && marker <= APP15) {
            frame->simple = frame->simple && is_harmless(marker, payload, length - 2);
        } else if (marker != DQT && marker != DHT && marker != DRI && marker != COM) {
            return 0;
        }
        at += 2 + length;
    }
    return 0;
}

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf back;
} Errors;

static void give_up(j_common_ptr jpeg)
{
    longjmp(((Errors *)jpeg->err)->back, 1);
}

/* Level -1 is a warning; the others are of no concern. */
static void give_up_at_a_warning(j_common_ptr jpeg, int level)
{
    if (level < 0)
        give_up(jpeg);
}

static void say_nothing(j_common_ptr jpeg)
{
    (void)jpeg;
}

static void be_quiet(Errors *errors)
{
    jpeg_std_error(&errors->base);
    errors->base.error_exit = give_up;
    errors->base.emit_message = give_up_at_a_warning;
    errors->base.output_message = say_nothing;
}

/* Whether every coefficient has come at full precision. If not, libjpeg smooths, each version in its way. */
static int is_complete(j_decompress_ptr jpeg)
{
    if (!jpeg->progressive_mode)
        return 1;
    for (int component = 0; component < jpeg->num_components; component++)
        for (int k = 0; k < DCTSIZE2; k++)
            if (jpeg->coef_bits[component][k] != 0)
                return 0;
    return 1;
}

/* Whether what has not been decoded is coded data, fill bytes and restart markers up to an end marker. */
static int ends_well(j_decompress_ptr jpeg)
{
    if (jpeg_has_multiple_scans(jpeg)) /* all of them were read before the first row */
        return 1;
    const unsigned char *at = jpeg->src->next_input_byte, *end = at + jpeg->src->bytes_in_buffer;
    int marker = jpeg->unread_marker;
    while (marker != EOI) {
        if (marker != 0 && (marker < RST0 || marker > RST7))
            return 0;
        at = at < end ? memchr(at, 0xFF, end - at) : NULL;
        while (at != NULL && at < end && *at == 0xFF)
            at++;
        if (at == NULL || at == end)
            return 0;
        marker = *at++; /* 0: FF was a byte of the data */
    }
    return 1;
}

/* Read over the rows that are left, to the end marker: whatever there is to warn of below the box comes up. */
static int reads_to_the_end(j_decompress_ptr jpeg, JSAMPARRAY row)
{
    while (jpeg->output_scanline < jpeg->output_height) {
        /* A skip begins at a group of rows, and not to the very end: that would not read. */
        JDIMENSION left = jpeg->output_height - jpeg->output_scanline;
        if (jpeg->output_scanline % 2 == 0 && left > 1)
            jpeg_skip_scanlines(jpeg, left - 1);
        if (jpeg_read_scanlines(jpeg, row, 1) != 1)
            return 0;
    }
    return jpeg_finish_decompress(jpeg);
}

/* Rows of the box from a decoder that has started. */
static int read_rows(j_decompress_ptr jpeg, Frame frame, Box box, unsigned char *out)
{
    unsigned channels = jpeg->output_components;
    JDIMENSION left = box.left > MARGIN ? box.left - MARGIN : 0;
    JDIMENSION right = box.left + box.width + MARGIN;
    JDIMENSION width = (right < jpeg->output_width ? right : jpeg->output_width) - left;
    if (width < jpeg->output_width)
        jpeg_crop_scanline(jpeg, &left, &width); /* moves left to where a unit begins */
    if (left > box.left || left + width < box.left + box.width)
        return 0;
    JSAMPARRAY row = jpeg->mem->alloc_sarray((j_common_ptr)jpeg, JPOOL_IMAGE, width * channels, 1);
    JDIMENSION skipped = box.top & ~1u; /* a group of rows begins there */
    if (skipped > 0 && jpeg_skip_scanlines(jpeg, skipped) != skipped)
        return 0;
    while (jpeg->output_scanline < box.top + box.height) {
        int wanted = jpeg->output_scanline >= box.top;
        if (jpeg_read_scanlines(jpeg, row, 1) != 1)
            return 0;
        if (wanted) {
            memcpy(out, row[0] + (box.left - left) * channels, (size_t)box.width * channels);
            out += (size_t)box.width * channels;
        }
    }
    return frame.simple ? ends_well(jpeg) : reads_to_the_end(jpeg, row);
}

/* Fills out, uint8 [height, width, channels] of the box; false where the whole picture has to be asked. No Python. */
static int decode_box(const unsigned char *data, size_t size, Frame frame, Box box, unsigned channels, unsigned char *out)
{
    struct jpeg_decompress_struct jpeg;
    Errors errors;
    jpeg.err = &errors.base;
    be_quiet(&errors);
    if (setjmp(errors.back)) {
        jpeg_destroy_decompress(&jpeg);
        return 0;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, data, size);
    int found = jpeg_read_header(&jpeg, TRUE) == JPEG_HEADER_OK && !jpeg.arith_code &&
                jpeg.jpeg_color_space == (frame.components == 1 ? JCS_GRAYSCALE : JCS_YCbCr) &&
                jpeg.image_width == frame.width && jpeg.image_height == frame.height;
    if (found) {
        jpeg.out_color_space = channels == 1 ? JCS_GRAYSCALE : JCS_RGB;
        found = jpeg_start_decompress(&jpeg) && is_complete(&jpeg) && read_rows(&jpeg, frame, box, out);
    }
    jpeg_destroy_decompress(&jpeg);
    return found;
}

static PyObject *size_of(PyObject *module, PyObject *object)
{
    Py_buffer data;
    Frame frame;
    (void)module;
    if (PyObject_GetBuffer(object, &data, PyBUF_SIMPLE) != 0)
        return NULL;
    int plain = read_segments(data.buf, data.len, &frame);
    PyBuffer_Release(&data);
    if (!plain)
        Py_RETURN_NONE;
    return Py_BuildValue("(III)", frame.height, frame.width, frame.components);
}

static int fits(Frame frame, Box box, unsigned channels, Py_ssize_t size)
{
    return box.height > 0 && box.height <= frame.height && box.top <= frame.height - box.height && box.width > 0 &&
           box.width <= frame.width && box.left <= frame.width - box.width &&
           (channels == 3 || (channels == 1 && frame.components == 1)) &&
           (size_t)size == (size_t)box.height * box.width * channels;
}

static PyObject *decode(PyObject *module, PyObject *arguments)
{
    Py_buffer data, out;
    Frame frame;
    Box box;
    unsigned channels;
    int plain, found = 0;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*w*IIIII", &data, &out, &box.top, &box.left, &box.height, &box.width, &channels))
        return NULL;
    plain = read_segments(data.buf, data.len, &frame);
    if (plain && !fits(frame, box, channels, out.len)) {
        PyErr_SetString(PyExc_ValueError, "the box is not inside the picture, or out is not of its size");
    } else if (plain) {
        Py_BEGIN_ALLOW_THREADS
        found = decode_box(data.buf, data.len, frame, box, channels, out.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&out);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(found);
}

/* Whether the library that was loaded is the one whose header this was built with. */
static int library_fits(void)
{
    struct jpeg_decompress_struct jpeg;
    Errors errors;
    jpeg.err = &errors.base;
    be_quiet(&errors);
    if (setjmp(errors.back))
        return 0;
    jpeg_create_decompress(&jpeg);
    jpeg_destroy_decompress(&jpeg);
    return 1;
}

static PyMethodDef methods[] = {
    {"size_of", size_of, METH_O, "(height, width, components) of a plain JPEG by its header, else None."},
    {"decode", decode, METH_VARARGS, "decode(data, out, top, left, height, width, channels): whether out is filled."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_jpegbox", "A box of a JPEG, without decoding the rest.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__jpegbox(void)
{
    if (!library_fits()) {
        PyErr_SetString(PyExc_ImportError, "libjpeg is another one than this was built for");
        return NULL;
    }
    return PyModule_Create(&definition);
}
