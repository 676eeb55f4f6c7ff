/* Search in pages that are opened from the disk: there a browser starts no worker, so a hidden frame does its work. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      this.ready = new Promise((done) => {
        inside.importScripts = (...scripts) =>
          scripts.reduce((earlier, script) => earlier.then(() => this.load(script)), Promise.resolve());
        inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        this.load(url).then(done);
      });
    }
    load(src) {
      return new Promise((done) => {
        const script = this.frame.contentDocument.createElement("script");
        Object.assign(script, { src, onload: done, onerror: done });
        this.frame.contentDocument.body.append(script);
      });
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
