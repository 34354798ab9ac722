//! The `node-image-pivot` program: the command line and, as `node-image-pivot daemon`, the daemon.

fn main() -> std::process::ExitCode {
    node_image_pivot::cli::main()
}
