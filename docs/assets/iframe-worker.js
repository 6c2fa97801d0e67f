// Search in pages that are opened from the disk: browsers start no worker there, so a hidden frame takes its place.
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      this.loaded = new Promise((resolve) => this.frame.addEventListener("load", resolve))
      const { contentDocument: page, contentWindow: scope } = this.frame
      page.open()
      scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      page.write(`<script src="${url}"></script>`)
      page.close()
    }

    postMessage(data) {
      const message = new MessageEvent("message", { data })
      this.loaded.then(() => this.frame.contentWindow.dispatchEvent(message))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
