//
// Classifies camera frames on iOS 16 or macOS 13 and later, with Core ML and Vision.
// Written by keras_vits; the folder `model` beside it goes into the app as a folder reference.
//
//     let classifier = try await ImageClassifier(folder: Bundle.main.url(forResource: "model", withExtension: nil)!)
//     let best = try classifier.classify(CIImage(cvPixelBuffer: frame), orientation: .right).first
//

import CoreImage
import CoreImage.CIFilterBuiltins
import CoreML
import ImageIO
import Vision

public final class ImageClassifier {
    public struct Prediction: Identifiable {
        public let label: String
        public let probability: Float
        public let index: Int  // of the class
        public var id: Int { index }
    }

    public struct SelfTest {
        public let passed: Bool
        public let pictures: Int
        public let agreement: Float  // fraction of the pictures with the expected class
        public let maxError: Float  // of an output
        public let tolerance: Float
    }

    public enum Failure: Error {
        case noBuffer
        case noOutput
        case unreadable(String)
    }

    private struct Description: Decodable {
        struct Input: Decodable {
            let name: String
            let shape: [Int]
            let dtype: String
        }
        struct Output: Decodable {
            let name: String
        }
        struct Preprocessing: Decodable {
            let mean: [Float]
            let std: [Float]
            let channelOrder: String
            let crop: CGFloat
            let cropMode: String
        }
        let file: String
        // logits, sigmoid (of a single class) or softmax
        let head: String
        let input: Input
        let outputs: [Output]
        let preprocessing: Preprocessing
    }

    private struct Expected: Decodable {
        struct Tolerance: Decodable {
            let cpu: Float
            let gpu: Float
        }
        struct Picture: Decodable {
            let file: String
            let `class`: Int
            let output: [Float]
        }
        let tolerance: Tolerance
        let pictures: [Picture]
    }

    private let folder: URL
    private let description: Description
    private let labels: [String]
    private let model: MLModel
    private let computeUnits: MLComputeUnits
    private let context = CIContext(options: [.workingColorSpace: NSNull()])  // pixels keep their values

    /// - Parameters:
    ///   - folder: the folder `model` of the bundle.
    ///   - computeUnits: `.all`, `.cpuOnly`, `.cpuAndGPU` or `.cpuAndNeuralEngine`.
    public init(folder: URL, computeUnits: MLComputeUnits = .all) async throws {
        self.folder = folder
        self.computeUnits = computeUnits
        description = try Self.read("model.json", in: folder)
        labels = try String(contentsOf: folder.appendingPathComponent("labels.txt"), encoding: .utf8)
            .split(separator: "\n").map(String.init)
        let configuration = MLModelConfiguration()
        configuration.computeUnits = computeUnits
        let compiled = try await MLModel.compileModel(at: folder.appendingPathComponent(description.file))
        model = try MLModel(contentsOf: compiled, configuration: configuration)
    }

    /// The most probable labels of a frame that is held as `orientation` says, the best one first; of a model with a
    /// single class that one, however improbable.
    public func classify(
        _ frame: CIImage, orientation: CGImagePropertyOrientation = .up, top: Int = 5
    ) throws -> [Prediction] {
        let upright = frame.oriented(orientation)
        let output = try run(draw(upright, size: resized(upright.extent.size)))
        let found = probabilities(output).enumerated().map { index, probability in
            Prediction(label: label(index), probability: probability, index: index)
        }
        return Array(found.sorted { $0.probability > $1.probability }.prefix(top))
    }

    /// Runs the ten pictures that came with the model and compares the outputs with the expected ones.
    public func selfTest() throws -> SelfTest {
        let expected: Expected = try Self.read("selftest.json", in: folder)
        let tolerance = computeUnits == .cpuOnly ? expected.tolerance.cpu : expected.tolerance.gpu
        var maxError: Float = 0
        var agreeing = 0
        for picture in expected.pictures {
            let file = folder.appendingPathComponent(picture.file)
            guard let image = CIImage(contentsOf: file, options: [.colorSpace: NSNull()]) else {
                throw Failure.unreadable(picture.file)
            }
            let output = try run(draw(image, size: image.extent.size))
            for (value, wanted) in zip(output, picture.output)
            where !maxError.isNaN && !(abs(value - wanted) <= maxError) {
                maxError = abs(value - wanted)  // NaN stays
            }
            if decide(output) == picture.class { agreeing += 1 }
        }
        let count = expected.pictures.count
        return SelfTest(
            passed: maxError <= tolerance, pictures: count, agreement: Float(agreeing) / Float(count),
            maxError: maxError, tolerance: tolerance)
    }

    private static func read<Content: Decodable>(_ name: String, in folder: URL) throws -> Content {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        return try decoder.decode(Content.self, from: Data(contentsOf: folder.appendingPathComponent(name)))
    }

    private func label(_ index: Int) -> String {
        index < labels.count ? labels[index] : "class \(index)"
    }

    /// Size of a frame in the pixels of the model's input, of which `crop` is kept.
    private func resized(_ frame: CGSize) -> CGSize {
        let (crop, mode) = (description.preprocessing.crop, description.preprocessing.cropMode)
        let target = CGSize(
            width: (CGFloat(description.input.shape[2]) / crop).rounded(.down),
            height: (CGFloat(description.input.shape[1]) / crop).rounded(.down))
        if mode == "squash" { return target }
        if mode == "center" && target.height == target.width {
            let short = min(frame.width, frame.height)
            return CGSize(
                width: (target.width * frame.width / short).rounded(.down),
                height: (target.height * frame.height / short).rounded(.down))
        }
        let (down, across) = (frame.height / target.height, frame.width / target.width)
        let ratio = mode == "center" ? min(down, across) : max(down, across)
        return CGSize(
            width: (frame.width / ratio).rounded(.toNearestOrEven),
            height: (frame.height / ratio).rounded(.toNearestOrEven))
    }

    /// Where a side begins that is put into the middle of another one.
    private func centered(_ size: CGFloat, _ target: Int) -> CGFloat {
        let room = (CGFloat(target) - size) / 2
        return room < 0 ? room.rounded(.toNearestOrEven) : room.rounded(.down)
    }

    /// BGRA of the model's input size, with the picture of this size in its middle, on the mean colour.
    private func draw(_ image: CIImage, size: CGSize) throws -> CVPixelBuffer {
        let (height, width) = (description.input.shape[1], description.input.shape[2])
        var scaled = image
        if size != image.extent.size {
            let across = size.width / image.extent.width
            let down = size.height / image.extent.height
            let filter = CIFilter.lanczosScaleTransform()
            filter.inputImage = image.clampedToExtent()
            filter.scale = Float(down)
            filter.aspectRatio = Float(across / down)
            let place = image.extent.applying(CGAffineTransform(scaleX: across, y: down))
            scaled = filter.outputImage!.cropped(to: place)
        }
        let x = centered(size.width, width) - scaled.extent.minX
        let top = centered(size.height, height)
        let y = CGFloat(height) - top - size.height - scaled.extent.minY  // Core Image counts from the bottom
        let mean = description.preprocessing.mean.map { CGFloat($0) }
        let color = description.preprocessing.channelOrder == "bgr" ? mean.reversed() : mean
        let bounds = CGRect(x: 0, y: 0, width: width, height: height)
        let background = CIImage(
            color: CIColor(red: color[0], green: color[color.count / 2], blue: color[color.count - 1]))
        let prepared = scaled.transformed(by: CGAffineTransform(translationX: x, y: y))
            .composited(over: background.cropped(to: bounds))
        var created: CVPixelBuffer?
        let attributes = [kCVPixelBufferIOSurfacePropertiesKey: [String: Any]()] as CFDictionary
        CVPixelBufferCreate(nil, width, height, kCVPixelFormatType_32BGRA, attributes, &created)
        guard let buffer = created else { throw Failure.noBuffer }
        context.render(prepared, to: buffer, bounds: bounds, colorSpace: nil)
        return buffer
    }

    /// The K numbers that the model gives on a frame of its input size.
    private func run(_ frame: CVPixelBuffer) throws -> [Float] {
        guard description.input.dtype == "image" else {
            let input = [description.input.name: MLFeatureValue(multiArray: try normalized(frame))]
            let found = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: input))
            return try numbers(description.outputs.compactMap { found.featureValue(for: $0.name) })
        }
        let request = VNCoreMLRequest(model: try VNCoreMLModel(for: model))
        request.imageCropAndScaleOption = .scaleFill  // nothing is left to crop or scale
        try VNImageRequestHandler(cvPixelBuffer: frame).perform([request])
        if let classes = request.results as? [VNClassificationObservation], !classes.isEmpty {
            let found = Dictionary(uniqueKeysWithValues: classes.map { ($0.identifier, $0.confidence) })
            return labels.map { found[$0] ?? .nan }
        }
        let found = request.results as? [VNCoreMLFeatureValueObservation] ?? []
        return try numbers(
            description.outputs.compactMap { output in found.first { $0.featureName == output.name }?.featureValue })
    }

    /// The first output that holds numbers; those of a classifier in the order of the labels.
    private func numbers(_ outputs: [MLFeatureValue]) throws -> [Float] {
        for output in outputs {
            if output.type == .dictionary {
                return labels.map { output.dictionaryValue[$0]?.floatValue ?? .nan }
            }
            if let array = output.multiArrayValue {
                return (0..<array.count).map { array[$0].floatValue }
            }
        }
        throw Failure.noOutput
    }

    /// (pixel / 255 - mean) / std of a BGRA frame, in the model's order of channels.
    private func normalized(_ frame: CVPixelBuffer) throws -> MLMultiArray {
        let shape = description.input.shape
        let (height, width, channels) = (shape[1], shape[2], shape[3])
        let array = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: .float32)
        let values = array.dataPointer.bindMemory(to: Float.self, capacity: array.count)
        let (mean, std) = (description.preprocessing.mean, description.preprocessing.std)
        let bgr = description.preprocessing.channelOrder == "bgr"
        CVPixelBufferLockBaseAddress(frame, .readOnly)
        defer { CVPixelBufferUnlockBaseAddress(frame, .readOnly) }
        guard let base = CVPixelBufferGetBaseAddress(frame) else { throw Failure.noBuffer }
        let bytesPerRow = CVPixelBufferGetBytesPerRow(frame)
        var i = 0
        for y in 0..<height {
            let row = base.advanced(by: y * bytesPerRow).assumingMemoryBound(to: UInt8.self)
            for x in 0..<width {
                for c in 0..<channels {
                    let value = channels == 1 ? grey(row, 4 * x) : Int(row[4 * x + (bgr ? c : 2 - c)])
                    values[i] = (Float(value) / 255 - mean[c]) / std[c]
                    i += 1
                }
            }
        }
        return array
    }

    /// Luminance, ITU-R 601, in the integers that Pillow uses.
    private func grey(_ bgra: UnsafePointer<UInt8>, _ at: Int) -> Int {
        (7471 * Int(bgra[at]) + 38470 * Int(bgra[at + 1]) + 19595 * Int(bgra[at + 2]) + 32768) >> 16
    }

    /// The class that an output tells: the largest, or 1 and 0 for a single class that is there or not.
    private func decide(_ output: [Float]) -> Int {
        if output.count > 1 { return output.indices.max { output[$0] < output[$1] } ?? 0 }
        return (output.first ?? 0) > (description.head == "sigmoid" ? 0 : 0.5) ? 1 : 0
    }

    private func probabilities(_ output: [Float]) -> [Float] {
        if description.head == "sigmoid" { return output.map { 1 / (1 + exp(-$0)) } }
        guard description.head == "logits" else { return output }
        let largest = output.max() ?? 0
        let powers = output.map { exp($0 - largest) }
        let sum = powers.reduce(0, +)
        return powers.map { $0 / sum }
    }
}
