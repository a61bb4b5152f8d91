import AVFoundation
import CoreImage
import SwiftUI

@main
struct ClassifierApp: App {
    @StateObject private var camera = Camera()

    var body: some Scene {
        WindowGroup {
            VStack(alignment: .leading) {
                ForEach(camera.found) { one in
                    Text("\(one.probability, format: .percent.precision(.fractionLength(1)))  \(one.label)")
                }
                Spacer()
                Text(camera.message).font(.footnote)
            }
            .padding()
            .frame(maxWidth: .infinity)
            .task { await camera.start() }
        }
    }
}

/// Tests the model, then classifies what the back camera sees.
final class Camera: NSObject, ObservableObject, AVCaptureVideoDataOutputSampleBufferDelegate {
    @Published var found: [ImageClassifier.Prediction] = []
    @Published var message = "Loading the model …"

    private let session = AVCaptureSession()
    private let queue = DispatchQueue(label: "frames")
    private var classifier: ImageClassifier?

    func start() async {
        do {
            let model = try await ImageClassifier(folder: Bundle.module.url(forResource: "model", withExtension: nil)!)
            let test = try model.selfTest()
            await show("Self-test \(test.passed ? "passed" : "FAILED"): error \(test.maxError) of \(test.tolerance)")
            guard await AVCaptureDevice.requestAccess(for: .video),
                let device = AVCaptureDevice.default(.builtInWideAngleCamera, for: .video, position: .back)
            else { return await show("There is no camera.") }
            classifier = model
            let output = AVCaptureVideoDataOutput()
            output.setSampleBufferDelegate(self, queue: queue)
            session.addInput(try AVCaptureDeviceInput(device: device))
            session.addOutput(output)
            queue.async { self.session.startRunning() }
        } catch {
            await show(error.localizedDescription)
        }
    }

    func captureOutput(
        _ output: AVCaptureOutput, didOutput sample: CMSampleBuffer, from connection: AVCaptureConnection
    ) {
        guard let frame = CMSampleBufferGetImageBuffer(sample) else { return }
        // The sensor lies on its side when the phone is held upright.
        guard let labels = try? classifier?.classify(CIImage(cvPixelBuffer: frame), orientation: .right) else { return }
        DispatchQueue.main.async { self.found = labels }
    }

    @MainActor private func show(_ text: String) {
        message = text
    }
}
