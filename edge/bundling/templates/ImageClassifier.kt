/*
 * Classifies camera frames on Android. Runs on LiteRT's CompiledModel API:
 *     implementation("com.google.ai.edge.litert:litert:2.3.0")
 *     implementation("com.google.ai.edge.litert:litert-gpu:2.3.0")  // for Accelerator.GPU
 * Written by keras_vits; the folder `model` beside it goes into src/main/assets. The package is yours to change.
 *
 *     val classifier = ImageClassifier(context, Accelerator.GPU)  // not on the main thread
 *     val best = classifier.classify(imageProxy.toBitmap(), imageProxy.imageInfo.rotationDegrees).first()
 *
 * One thread at a time: the buffers are reused from frame to frame.
 */
package imageclassifier

import android.content.Context
import android.graphics.Bitmap
import android.graphics.BitmapFactory
import android.graphics.Canvas
import android.graphics.Color
import android.graphics.Matrix
import android.graphics.Paint
import android.graphics.Rect
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel
import com.google.ai.edge.litert.LiteRtException
import kotlin.math.abs
import kotlin.math.exp
import kotlin.math.floor
import kotlin.math.max
import kotlin.math.min
import kotlin.math.round
import kotlin.math.roundToInt
import org.json.JSONArray
import org.json.JSONObject

data class Prediction(val label: String, val probability: Float, val index: Int)

/** [agreement] is the fraction of the pictures with the expected class, [maxError] the largest one of an output. */
data class SelfTest(
    val passed: Boolean,
    val pictures: Int,
    val agreement: Float,
    val maxError: Float,
    val tolerance: Float,
)

/**
 * @param preferred [Accelerator.CPU] or [Accelerator.GPU]; the CPU serves where the GPU cannot run the model.
 * @param folder of the model in the app's assets.
 */
class ImageClassifier(
    private val context: Context,
    preferred: Accelerator = Accelerator.CPU,
    private val folder: String = "model",
) : AutoCloseable {
    private val description = JSONObject(text("model.json"))
    private val labels = text("labels.txt").lines().dropLast(1)
    private val head = description.getString("head") // logits, sigmoid (of a single class), softmax or top_k

    private val input = description.getJSONObject("input")
    private val takesPixels = input.getString("dtype") == "uint8" // 0 to 255: the rest of the preprocessing is inside
    private val height = input.getJSONArray("shape").getInt(1)
    private val width = input.getJSONArray("shape").getInt(2)
    private val channels = input.getJSONArray("shape").getInt(3)

    private val preprocessing = description.getJSONObject("preprocessing")
    private val mean = preprocessing.getJSONArray("mean").floats()
    private val std = preprocessing.getJSONArray("std").floats()
    private val bgr = preprocessing.getString("channel_order") == "bgr"
    private val crop = preprocessing.getDouble("crop")
    private val cropMode = preprocessing.getString("crop_mode")

    /** What the model runs on. */
    var accelerator = preferred
        private set

    private val model =
        try {
            compiled(preferred)
        } catch (e: LiteRtException) {
            if (preferred == Accelerator.CPU) throw e
            accelerator = Accelerator.CPU
            compiled(Accelerator.CPU)
        }
    private val outputNames =
        description.getJSONArray("outputs").run { List(length()) { getJSONObject(it).getString("name") } }
    private val inputs = mapOf(input.getString("name") to model.createInputBuffer(input.getString("name")))
    private val outputs = outputNames.associateWith { model.createOutputBuffer(it) }

    /**
     * The most probable labels of a frame that is turned clockwise by [rotationDegrees] first, the best one first; of a
     * model with a single class that one, however improbable.
     */
    fun classify(frame: Bitmap, rotationDegrees: Int = 0, top: Int = 5): List<Prediction> {
        val upright = upright(frame, rotationDegrees)
        val (scaledWidth, scaledHeight) = resized(upright.width, upright.height)
        val probabilities = probabilities(run(draw(upright, scaledWidth, scaledHeight)))
        val classes = classes() ?: IntArray(probabilities.size) { it }
        return probabilities.indices
            .sortedByDescending { probabilities[it] }
            .take(top)
            .map { Prediction(labels.getOrElse(classes[it]) { c -> "class $c" }, probabilities[it], classes[it]) }
    }

    /** Runs the ten pictures that came with the model and compares the outputs with the expected ones. */
    fun selfTest(): SelfTest {
        val expected = JSONObject(text("selftest.json"))
        val unit = if (accelerator == Accelerator.CPU) "cpu" else "gpu"
        val tolerance = expected.getJSONObject("tolerance").getDouble(unit).toFloat()
        val pictures = expected.getJSONArray("pictures")
        var maxError = 0f
        var agreeing = 0
        for (i in 0 until pictures.length()) {
            val picture = pictures.getJSONObject(i)
            val bitmap = open(picture.getString("file")).use { BitmapFactory.decodeStream(it)!! }
            val found = run(draw(bitmap, width, height))
            picture.getJSONArray("output").floats().forEachIndexed { k, value ->
                val error = abs(found[k] - value)
                maxError = maxOf(maxError, error) // NaN stays
            }
            if (decide(found) == picture.getInt("class")) agreeing++
        }
        val count = pictures.length()
        return SelfTest(maxError <= tolerance, count, agreeing.toFloat() / count, maxError, tolerance)
    }

    override fun close() {
        (inputs.values + outputs.values).forEach { it.close() }
        model.close()
    }

    private fun compiled(accelerator: Accelerator): CompiledModel {
        val file = "$folder/${description.getString("file")}"
        return CompiledModel.create(context.assets, file, CompiledModel.Options(accelerator))
    }

    private fun upright(frame: Bitmap, rotationDegrees: Int): Bitmap {
        val readable = if (frame.config == Bitmap.Config.HARDWARE) frame.copy(Bitmap.Config.ARGB_8888, false) else frame
        if (rotationDegrees % 360 == 0) return readable
        val turn = Matrix().apply { postRotate(rotationDegrees.toFloat()) }
        return Bitmap.createBitmap(readable, 0, 0, readable.width, readable.height, turn, true)
    }

    /** Size of a frame in the pixels of the model's input, of which `crop` is kept. */
    private fun resized(frameWidth: Int, frameHeight: Int): Pair<Int, Int> {
        val targetHeight = floor(height / crop)
        val targetWidth = floor(width / crop)
        if (cropMode == "squash") return Pair(targetWidth.toInt(), targetHeight.toInt())
        if (cropMode == "center" && targetHeight == targetWidth) {
            val short = min(frameWidth, frameHeight)
            return Pair((targetWidth * frameWidth / short).toInt(), (targetHeight * frameHeight / short).toInt())
        }
        val down = frameHeight / targetHeight
        val across = frameWidth / targetWidth
        val ratio = if (cropMode == "center") min(down, across) else max(down, across)
        return Pair(round(frameWidth / ratio).toInt(), round(frameHeight / ratio).toInt())
    }

    /** Where a side begins that is put into the middle of another one. */
    private fun centered(size: Int, target: Int) =
        if (size > target) -round((size - target) / 2.0).toInt() else (target - size) / 2

    /** ARGB of the model's input size, with the picture of this size in its middle, on the mean colour. */
    private fun draw(bitmap: Bitmap, scaledWidth: Int, scaledHeight: Int): IntArray {
        var source = bitmap
        while (source.width >= 2 * scaledWidth && source.height >= 2 * scaledHeight) { // a filter sees 2x2 pixels only
            source = Bitmap.createScaledBitmap(source, source.width / 2, source.height / 2, true)
        }
        val prepared = Bitmap.createBitmap(width, height, Bitmap.Config.ARGB_8888)
        val color = (if (bgr) mean.reversedArray() else mean).map { (255 * it).roundToInt() }
        val left = centered(scaledWidth, width)
        val top = centered(scaledHeight, height)
        val place = Rect(left, top, left + scaledWidth, top + scaledHeight)
        Canvas(prepared).run {
            drawColor(Color.rgb(color.first(), color[color.size / 2], color.last()))
            drawBitmap(source, null, place, Paint(Paint.FILTER_BITMAP_FLAG))
        }
        return IntArray(width * height).also { prepared.getPixels(it, 0, width, 0, 0, width, height) }
    }

    /** The first output on ARGB pixels. */
    private fun run(argb: IntArray): FloatArray {
        val buffer = inputs.values.single()
        if (takesPixels) {
            buffer.writeInt8(ByteArray(argb.size * channels) { channel(argb[it / channels], it % channels).toByte() })
        } else {
            buffer.writeFloat(
                FloatArray(argb.size * channels) {
                    val c = it % channels
                    val value = channel(argb[it / channels], if (bgr) channels - 1 - c else c)
                    (value / 255f - mean[c]) / std[c]
                }
            )
        }
        model.run(inputs, outputs)
        return outputs.getValue(outputNames[0]).readFloat()
    }

    /** Red, green or blue, or for a grey model the luminance (ITU-R 601 in the integers that Pillow uses). */
    private fun channel(argb: Int, c: Int): Int {
        val red = argb shr 16 and 255
        val green = argb shr 8 and 255
        val blue = argb and 255
        if (channels == 1) return (19595 * red + 38470 * green + 7471 * blue + 32768) shr 16
        return when (c) { 0 -> red; 1 -> green; else -> blue }
    }

    /** Class numbers of a top-k model's last run. */
    private fun classes() = if (head == "top_k") outputs.getValue(outputNames[1]).readInt() else null

    /** The class that an output tells: the largest, or 1 and 0 for a single class that is there or not. */
    private fun decide(output: FloatArray): Int {
        classes()?.let { return it.first() }
        if (output.size > 1) return output.indices.maxBy { output[it] }
        return if (output[0] > (if (head == "sigmoid") 0f else 0.5f)) 1 else 0
    }

    private fun probabilities(output: FloatArray): FloatArray {
        if (head == "sigmoid") return FloatArray(output.size) { 1 / (1 + exp(-output[it])) }
        if (head != "logits") return output
        val largest = output.max()
        val powers = FloatArray(output.size) { exp(output[it] - largest) }
        val sum = powers.sum()
        return FloatArray(output.size) { powers[it] / sum }
    }

    private fun open(name: String) = context.assets.open("$folder/$name")

    private fun text(name: String) = open(name).bufferedReader().use { it.readText() }
}

private fun JSONArray.floats() = FloatArray(length()) { getDouble(it).toFloat() }
