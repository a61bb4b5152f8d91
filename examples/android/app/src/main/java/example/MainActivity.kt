package example

import android.graphics.Bitmap
import android.os.Bundle
import android.widget.Button
import android.widget.LinearLayout
import android.widget.TextView
import androidx.activity.ComponentActivity
import androidx.activity.result.contract.ActivityResultContracts
import androidx.lifecycle.lifecycleScope
import com.google.ai.edge.litert.Accelerator
import imageclassifier.ImageClassifier
import java.util.concurrent.Executors
import kotlinx.coroutines.asCoroutineDispatcher
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

/** Takes a picture with the camera and tells what it shows; tests the model when it starts. */
class MainActivity : ComponentActivity() {
    private val worker = Executors.newSingleThreadExecutor().asCoroutineDispatcher() // the classifier's only thread
    private var classifier: ImageClassifier? = null
    private lateinit var text: TextView

    private val camera =
        registerForActivityResult(ActivityResultContracts.TakePicturePreview()) { picture ->
            if (picture != null) show { classify(it, picture) }
        }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        text = TextView(this)
        val button = Button(this).apply {
            text = "Camera"
            setOnClickListener { camera.launch(null) }
        }
        setContentView(
            LinearLayout(this).apply {
                orientation = LinearLayout.VERTICAL
                fitsSystemWindows = true
                addView(button)
                addView(text)
            }
        )
        show { "${it.accelerator}: ${it.selfTest()}" }
    }

    override fun onDestroy() {
        worker.executor.execute { classifier?.close() }
        worker.close()
        super.onDestroy()
    }

    private fun classify(classifier: ImageClassifier, picture: Bitmap) =
        classifier.classify(picture).joinToString("\n") { "%5.1f %%  %s".format(100 * it.probability, it.label) }

    private fun show(answer: (ImageClassifier) -> String) {
        lifecycleScope.launch {
            text.text = withContext(worker) {
                val ready = classifier ?: ImageClassifier(applicationContext, Accelerator.GPU).also { classifier = it }
                answer(ready)
            }
        }
    }
}
