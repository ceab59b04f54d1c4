class Expertd < Formula
  desc "One warm cache of Mixture-of-Experts weights for every app on the machine"
  homepage "https://pypi.org/project/expertd/"
  # Written at each release by: python -m tools.formula dist/expertd-VERSION.tar.gz
  url "https://files.pythonhosted.org/packages/source/e/expertd/expertd-0.1.0.tar.gz"
  sha256 "435a36ef24baf07ef3208775a7ed8311f6980f9b2f6d4bdd829b0be8e956ba34"
  license "MIT"

  depends_on "python@3.13"

  on_macos do
    depends_on arch: :arm64
    depends_on macos: :sonoma
  end

  # mlx comes as wheels only, so what expertd needs is not built from resources: pip brings it into a venv of its own.
  def install
    system Formula["python@3.13"].opt_bin/"python3.13", "-m", "venv", libexec
    system libexec/"bin/python", "-m", "pip", "install", "--no-cache-dir", buildpath
    bin.install_symlink libexec/"bin/expertd"
  end

  def caveats
    <<~EOS
      Daemons start on demand. To have one from login on, and after each upgrade:
        expertd service install
      Before you uninstall expertd:
        expertd service uninstall
    EOS
  end

  test do
    ENV["EXPERTD_HOME"] = testpath/"home"
    assert_match version.to_s, shell_output("#{bin}/expertd --version")
    assert_match "daemon_not_running", shell_output("#{bin}/expertd status 2>&1", 3)
    assert_match "[default: 8080]", shell_output("#{bin}/expertd serve --help").gsub(/\s+/, " ")
  end
end
