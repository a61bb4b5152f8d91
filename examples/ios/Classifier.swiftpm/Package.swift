// swift-tools-version: 5.9

import AppleProductTypes
import PackageDescription

let package = Package(
    name: "Classifier",
    platforms: [.iOS("16.0")],
    products: [
        .iOSApplication(
            name: "Classifier",
            targets: ["App"],
            bundleIdentifier: "example.classifier",
            displayVersion: "1.0",
            bundleVersion: "1",
            appIcon: .placeholder(icon: .camera),
            accentColor: .presetColor(.blue),
            supportedDeviceFamilies: [.pad, .phone],
            supportedInterfaceOrientations: [.portrait],
            capabilities: [.camera(purposeString: "To tell what is in front of it.")]
        )
    ],
    targets: [
        .executableTarget(name: "App", path: "App", resources: [.copy("model")])
    ]
)
